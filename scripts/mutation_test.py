"""Sabotages the library one line at a time; the test suite must notice each.

    bash scripts/with-venv python scripts/mutation_test.py

Works on a copy of the checkout. A sabotage that survives names a hole in the tests. About ten minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_ebm"


class Mutation(NamedTuple):
    """What goes wrong, where, which text, what stands there instead, and the tests that are there to notice."""

    what: str
    file: str
    text: str
    sabotage: str
    tests: str


MUTATIONS = [
    Mutation(
        "the energy loses its half",
        "energies/base.py",
        "return 0.5 * self.layer",
        "return 1.0 * self.layer",
        "predictive_coding",
    ),
    Mutation(
        "the update is not divided by B",
        "step.py",
        "(scale / network.loss_scale)\n        self._check",
        "scale\n        self._check",
        "predictive_coding",
    ),
    Mutation(
        "the nudge shrinks with the batch",
        "network.py",
        "self.loss_scale * seen.loss\n",
        "seen.loss\n",
        "predictive_coding",
    ),
    Mutation(
        "descent climbs",
        "relaxers/fixed_steps.py",
        "x.sub(gradient, alpha=lr)",
        "x.add(gradient, alpha=lr)",
        "predictive_coding",
    ),
    Mutation(
        "read a step early",
        "relaxers/fixed_steps.py",
        "if not ended:",
        "if step < max_steps - 1:",
        "predictive_coding relaxers",
    ),
    Mutation(
        "errors forget the precision",
        "network.py",
        "signals[k] if is_one(p) else signals[k] / p",
        "signals[k]",
        "infinitesimal_limit",
    ),
    Mutation(
        "the centred half is lost",
        "nudges/centered.py",
        "1 / (2 * self.strength)",
        "1 / self.strength",
        "predictive_coding infinitesimal_limit",
    ),
    Mutation(
        "hooks of parameters act twice",
        "delivery.py",
        "any(leaf._backward_hooks for leaf in targets)",
        "False",
        "delivery",
    ),
    Mutation("states get gradients too", "delivery.py", "if i not in held]", "]", "delivery predictive_coding"),
    Mutation(
        "signals sent bottom up",
        "network.py",
        "range(len(leaves) - 1, -1, -1)",
        "range(len(leaves))",
        "predictive_coding",
    ),
    Mutation(
        "masks are drawn anew",
        "purity.py",
        "                self._random.restore()\n",
        "                pass\n",
        "purity",
    ),
    Mutation(
        "a pass starts too early", "purity.py", "        self._is_taken = False\n", "        self._take()\n", "purity"
    ),
    Mutation(
        "labels are counted once",
        "capture/tape.py",
        "(kind.name in _NLL and _is_constant(node.args[1:3]))",
        "kind.name in _NLL",
        "capture",
    ),
    Mutation(
        "BatchNorm moves in each pass", "layers.py", "written=frozenset(written)", "written=frozenset()", "purity"
    ),
    Mutation(
        "metrics count each pass", "purity.py", '("forward", "compute", "update", "reset")', '("forward",)', "purity"
    ),
    Mutation(
        "a runaway is returned",
        "relaxers/fixed_steps.py",
        "(rose and descends) or unstable or growth > 10",
        "rose is None",
        "relaxers",
    ),
    Mutation(
        "accumulation is not undone",
        "strategy.py",
        "closure_loss, 1 / self._accumulated()",
        "closure_loss, 1.0",
        "conformance",
    ),
    Mutation(
        "a second call is forgotten", "substitution.py", "counts[module] = number + 1", "counts[module] = 0", "layers"
    ),
    Mutation(
        "states ignore what is above",
        "network.py",
        "best_response(-slope,",
        "best_response(0 * slope,",
        "equilibrium_propagation",
    ),
    Mutation(
        "phases are added up",
        "nudges/centered.py",
        "Phase(-self.strength",
        "Phase(self.strength",
        "equilibrium_propagation",
    ),
    Mutation(
        "odd layers move alone",
        "relaxers/sweeping.py",
        "return [odd, even] if even else [odd]",
        "return [odd]",
        "equilibrium_propagation",
    ),
    Mutation(
        "a changed constant is not seen",
        "capture/comparison.py",
        "return bool(old == new) or",
        "return True or",
        "capture",
    ),
    Mutation(
        "layers that read each other rest where they are predicted",
        "step.py",
        "and not any(row.parents for row in plan.rows)",
        "and plan.rows",
        "resting free_equilibrium",
    ),
    Mutation(
        "who derives from an energy inherits where it rests",
        "energies/base.py",
        'type(energy).__dict__.get("rests_at_prediction", False)',
        'getattr(energy, "rests_at_prediction", False)',
        "resting",
    ),
    Mutation(
        "GPUs are handed the processor's kernel",
        "capture/program.py",
        "    if rewrite is not None:",
        "    if True:",
        "products",
    ),
    Mutation(
        "rows are taken for granted",
        "capture/products.py",
        "return one == other == 1 and",
        "return True or",
        "products",
    ),
    Mutation(
        "a sum is forgotten by the kernel",
        "capture/products.py",
        "_multiply(kernel(), x, matrix, out, term is not None)",
        "_multiply(kernel(), x, matrix, out, False)",
        "products",
    ),
    Mutation(
        "weights are turned without being copied",
        "capture/running.py",
        ".t().contiguous()",
        ".t()",
        "products",
    ),
    Mutation(
        "the compiler's tanh has another coefficient",
        "capture/elementwise.py",
        "1.33314422036e-1",
        "1.33414422036e-1",
        "products",
    ),
    Mutation(
        "the heap is given back",
        "capture/captures.py",
        "        keep_heap()",
        "        pass",
        "heap",
    ),
    Mutation(
        "a mean of four is their half",
        "capture/kernels.py",
        "total.mul_(0.25)",
        "total.mul_(0.5)",
        "capture_fixed_points capture",
    ),
    Mutation(
        "errors are pulled by the conjugate",
        "network.py",
        "strength * holomorphic(signals[k])",
        "strength * signals[k]",
        "capture_complex infinitesimal_limit",
    ),
    Mutation(
        "all phases get the first one's rows", "capture/abreast.py", "k * rows, (k + 1) * rows", "0, rows", "abreast"
    ),
    Mutation(
        "phases end together",
        "relaxers/sweeping.py",
        "strengths[k] for k in points",
        "strengths[0] for k in points",
        "abreast",
    ),
    Mutation(
        "the forward pass is left too early",
        "capture/running.py",
        "if self.returns or self._found",
        "if self._found",
        "memory capture",
    ),
    Mutation(
        "no slope is analytic",
        "network.py",
        "self._check_analytic(seen)\n        return",
        "pass\n        return",
        "capture_complex",
    ),
    Mutation("a real part is added", "capture/pairs.py", "shape, less=True)", "shape)", "capture_complex"),
    Mutation("masks are left out", "capture/lowering.py", "return x * mask * scale", "return x * scale", "capture"),
    Mutation("only one end of a pair", "capture/dyads.py", "0.5 * (p + q)", "p", "capture_dyads"),
    Mutation(
        "what is read again is overwritten", "capture/reuse.py", "and last[value] == index", "", "capture_fixed_points"
    ),
    Mutation(
        "the front leaves parents behind",
        "capture/front.py",
        "(wrong, *(self._parents[k] for k in wrong))",
        "(wrong)",
        "front",
    ),
    Mutation("the front is ahead of the signal", "capture/front.py", "if known.issuperset(moved)", "if known", "front"),
    Mutation(
        "a state is its prediction for ever",
        "capture/lowering.py",
        "if self._level(mu) == CONSTANT}",
        "}",
        "front capture",
    ),
    Mutation(
        "layouts are not looked at",
        "capture/compiled.py",
        "self._runs.get(tuple([tensor.stride() for tensor in flat]))",
        "next(iter(self._runs.values()), None)",
        "compiled",
    ),
    Mutation(
        "directions are not conjugate",
        "relaxers/accelerated_fixed_point.py",
        "beta.clamp(0, _FURTHEST)",
        "beta * 0",
        "accelerated_fixed_point",
    ),
    Mutation(
        "operations before what they read",
        "capture/order.py",
        "            if before:\n",
        "            if before and not order:\n",
        "order",
    ),
    Mutation(
        "a dead gradient reads nan", "metrics.py", "torch.where(dead_g | dead_r, zero, dot", "(0 + dot", "metrics"
    ),
    Mutation("each sign chooses by itself", "relaxers/trials.py", "if not missed:", "if missed < 0:", "cheapest"),
    Mutation("who is given up may win", "relaxers/trials.py", "dear = FURTHER * min(", "dear = 0 * min(", "cheapest"),
    Mutation(
        "signs are compared only where steps are captured",
        "step.py",
        "if not captured and not isinstance(relaxer, Cheapest):",
        "if not captured:",
        "cheapest",
    ),
    Mutation(
        "an update is used up",
        "capture/replay.py",
        "list(left[0]) if again else left.pop()",
        "left.pop()",
        "fixed_steps capture delivery",
    ),
    Mutation(
        "forces are measured too late",
        "relaxers/fixed_steps.py",
        "step > max_steps - 4)",
        "step > max_steps - 3)",
        "fixed_steps",
    ),
    Mutation(
        "points are not let go of",
        "capture/writing.py",
        'lines.append(f"{parameters[taken]}.clear()")',
        "pass",
        "memory",
    ),
]


def caught(copy: Path, tests: str) -> bool:
    """Whether these tests fail in that copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([*command, *files], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # not a verdict of the tests
        raise SystemExit(done.stdout + done.stderr)
    return done.returncode == 1


def main() -> int:
    """Number of sabotages that nobody noticed."""
    survivors = 0
    for mutation in MUTATIONS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for part in (PACKAGE, "tests", "recipes", "benchmarks"):
                shutil.copytree(ROOT / part, copy / part)
            shutil.copy(ROOT / "pyproject.toml", copy)
            target = copy / PACKAGE / mutation.file
            text = target.read_text()
            if mutation.text not in text:
                raise SystemExit(f"{mutation.file} no longer has {mutation.text!r}: bring this list up to date.")
            target.write_text(text.replace(mutation.text, mutation.sabotage))
            noticed = caught(copy, mutation.tests)
        survivors += not noticed
        print(f"{'caught' if noticed else 'SURVIVED'}: {mutation.what} ({mutation.file})", flush=True)
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
