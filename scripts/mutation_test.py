"""Sabotages the library one line at a time; the test suite must notice each.

    bash scripts/with-venv python scripts/mutation_test.py

Works on a copy of the checkout. A sabotage that survives names a hole in the tests. Names of some of them as
arguments run these alone; `--json FILE` keeps the verdicts, and goes on where a run that was stopped had come to. About
half an hour.
"""

import argparse
import json
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
        "return 0.5 * precision_of(self, layer)",
        "return 1.0 * precision_of(self, layer)",
        "energies",
    ),
    Mutation(
        "the update is not divided by B",
        "step/step.py",
        "update = self._relaxed(network, scale / network.loss_scale)",
        "update = self._relaxed(network, scale)",
        "predictive_coding",
    ),
    Mutation(
        "the nudge shrinks with the batch",
        "network/network.py",
        "self.loss_scale * seen.loss\n",
        "seen.loss\n",
        "predictive_coding",
    ),
    Mutation(
        "descent climbs",
        "evaluations/descent_step.py",
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
        "evaluations/error_forces.py",
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
        "network/precomputed_gradient.py",
        "any(leaf._backward_hooks for leaf in targets)",
        "False",
        "precomputed_gradient",
    ),
    Mutation(
        "states get gradients too",
        "network/precomputed_gradient.py",
        "if id(leaf) not in held]",
        "]",
        "precomputed_gradient predictive_coding",
    ),
    Mutation(
        "signals sent bottom up",
        "network/top_down.py",
        "range(len(leaves) - 1, -1, -1)",
        "range(len(leaves))",
        "predictive_coding",
    ),
    Mutation(
        "masks are drawn anew",
        "purity.py",
        "        stack.callback(RandomState(module).restore)\n",
        "",
        "purity",
    ),
    Mutation("plain state stays", "purity.py", "        stack.callback(PlainState(module).restore)\n", "", "purity"),
    Mutation(
        "metrics count each pass",
        "purity.py",
        "stack.callback(_reset, metric, dict(vars(metric)))",
        "pass",
        "purity",
    ),
    Mutation(
        "a runaway is returned",
        "relaxers/fixed_steps.py",
        "(rose and proves) or unstable or growth > 10",
        "rose is None",
        "relaxers",
    ),
    Mutation(
        "accumulation is not undone",
        "strategies/base.py",
        "surrogate = self._step.surrogate(closure_loss, 1 / self._accumulated())",
        "surrogate = self._step.surrogate(closure_loss, 1.0)",
        "conformance",
    ),
    Mutation(
        "states ignore what is above",
        "evaluations/best_responses.py",
        "best_response(network.energy, pull,",
        "best_response(network.energy, 0 * pull,",
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
        "layers that read each other rest where they are predicted",
        "step/setup.py",
        "and not any(row.parents for row in plan.rows)",
        "and plan.rows",
        "resting free_equilibrium",
    ),
    Mutation(
        "who derives from an energy inherits where it rests",
        "promises.py",
        "return all(author <= _author(part, name) for name in about)",
        "return True",
        "resting own_energy",
    ),
    Mutation(
        "errors are pulled by the conjugate",
        "evaluations/error_forces.py",
        "strength * holomorphic(signals[k])",
        "strength * signals[k]",
        "theory",
    ),
    Mutation(
        "no slope is analytic",
        "step/step.py",
        "if end is not None and not known.analytic:",
        "if False:",
        "code_complex",
    ),
    Mutation(
        "directions are not conjugate",
        "relaxers/accelerated_fixed_point.py",
        "beta.clamp(0, _FURTHEST)",
        "beta * 0",
        "accelerated_fixed_point",
    ),
    Mutation(
        "a dead gradient reads nan", "metrics.py", "torch.where(dead_g | dead_r, zero, dot", "(0 + dot", "metrics"
    ),
    Mutation("each sign chooses by itself", "relaxers/trials.py", "if not missed:", "if missed < 0:", "cheapest"),
    Mutation("who is given up may win", "relaxers/trials.py", "dear = FURTHER * min(", "dear = 0 * min(", "cheapest"),
    Mutation(
        "forces are measured too late",
        "relaxers/fixed_steps.py",
        "step > max_steps - 4)",
        "step > max_steps - 3)",
        "fixed_steps",
    ),
    Mutation(
        "what the user detaches goes on",
        "program/recorder.py",
        "if func is _DETACH and not self.asked:",
        "if func is _DETACH:",
        "programs",
    ),
    Mutation(
        "what is off is computed again",
        "program/recorder.py",
        "if not torch.is_grad_enabled() or",
        "if",
        "programs",
    ),
    Mutation(
        "masks pick anew",
        "program/recorder.py",
        "if kind.name in BY_MASK or kind.name in PUT_BY_MASK:",
        "if False:",
        "programs",
    ),
    Mutation(
        "random numbers are drawn again",
        "program/recorder.py",
        "repeated is None:\n                return self._constant(func, kind, args, kwargs, written)",
        "False:\n                return self._constant(func, kind, args, kwargs, written)",
        "programs",
    ),
    Mutation(
        "what is written to is not copied before",
        "program/contents.py",
        "self._record.inputs[value] = alias.detach().clone()",
        "pass",
        "programs",
    ),
    Mutation(
        "gradient hooks are forgotten",
        "program/torch_calls.py",
        "recorder.record.hooks.setdefault(value, []).append(heard)",
        "pass",
        "programs",
    ),
    Mutation(
        "who writes to its input is trusted",
        "program/custom_calls.py",
        "if id(tensor) in before and tensor._version:",
        "if False:",
        "programs",
    ),
    Mutation(
        "reentrant checkpoints run unseen",
        "program/custom_calls.py",
        "if function is CheckpointFunction:",
        "if False:",
        "programs",
    ),
    Mutation(
        "graphs from before the step are leaves",
        "program/contents.py",
        "        if tensor.requires_grad and not tensor.is_leaf:\n",
        "        if False:\n",
        "programs",
    ),
    Mutation(
        "leaves that the pass makes are none",
        "program/contents.py",
        "value not in self._record.leaves and _is_leaf(tensor):",
        "False:",
        "programs",
    ),
    Mutation(
        "marks are read as what they mark",
        "program/contents.py",
        "self.bind(output, state, keeps=True)",
        "pass",
        "programs",
    ),
    Mutation(
        "views lie at the start",
        "program/aliasing.py",
        ".as_strided(size, stride, offset)",
        ".as_strided(size, stride, 0)",
        "programs",
    ),
    Mutation(
        "other views keep what they had",
        "program/aliasing.py",
        "            rebind(alias, make(read_memory, (memory, *where), alias))\n",
        "            make(read_memory, (memory, *where), alias)\n",
        "programs",
    ),
    Mutation(
        "memory is read in the order of dimensions",
        "program/aliasing.py",
        "key=lambda d: (-strides[d], -tensor.shape[d])",
        "key=lambda d: d",
        "programs",
    ),
    Mutation(
        "masks are left out",
        "program/random_draws.py",
        "return x * mask * scale, mask",
        "return x * scale, mask",
        "programs",
    ),
    Mutation(
        "dropout does not scale",
        "program/random_draws.py",
        "0.0 if p == 1 else 1 / (1 - p)",
        "1.0",
        "programs",
    ),
    Mutation(
        "custom functions are not seen",
        "program/seams.py",
        "if recorder is None or not torch.is_grad_enabled():\n        return plain",
        "if True:\n        return plain",
        "programs",
    ),
    Mutation(
        "torch stays patched",
        "program/seams.py",
        "setattr(owner, name, plain)",
        "pass",
        "recorder",
    ),
    Mutation(
        "backward hooks of modules are not seen",
        "program/seams.py",
        "if (recorder := seams.recorder) is None or not torch.is_grad_enabled():\n        return _SETUP_INPUT",
        "if True:\n        return _SETUP_INPUT",
        "programs",
    ),
    Mutation(
        "a second call is forgotten",
        "program/calls.py",
        "self._counts[module] = number + 1",
        "self._counts[module] = number",
        "predictive_coding layers",
    ),
    Mutation(
        "states in place are not known",
        "program/calls.py",
        "contents.bind(state, mark.state)",
        "pass",
        "equilibrium_propagation",
    ),
    Mutation(
        "nothing is cut",
        "program/interpreter.py",
        "state.to(original.dtype) if narrower else state",
        "original",
        "programs",
    ),
    Mutation(
        "states live in what the layer computes in",
        "program/interpreter.py",
        "return tensor.float() if tensor.dtype in",
        "return tensor if tensor.dtype in",
        "programs",
    ),
    Mutation(
        "leaves that the pass makes are computed",
        "program/held.py",
        "if value in self._record.leaves:\n                tensor",
        "if False:\n                tensor",
        "programs",
    ),
    Mutation(
        "hooks are not repeated",
        "program/held.py",
        "                    tensor.register_hook(hook)\n",
        "                    pass\n",
        "programs",
    ),
    Mutation(
        "code is traced through hooks",
        "program/interpreter.py",
        "        if self.record.hooks:\n            return",
        "        if False:\n            return",
        "programs",
    ),
    Mutation(
        "code is traced through hooked modules",
        "program/interpreter.py",
        "if hooked_input in functions or hooked_output in functions:",
        "if False:",
        "programs",
    ),
    Mutation(
        "the loss has no parents",
        "program/wiring.py",
        "loss_parents=self._parents(self._above_loss),",
        "loss_parents=(),",
        "programs",
    ),
    Mutation(
        "layers have no parents",
        "program/wiring.py",
        "names, modules, self._parents(region)))",
        "names, modules, ()))",
        "predictive_coding",
    ),
    Mutation(
        "what is fed by states alone is no layer",
        "program/wiring.py",
        "if self._parameters(region) or fed & set(self._parents(region)):",
        "if self._parameters(region):",
        "layers",
    ),
    Mutation(
        "any end is a read-out",
        "program/layers.py",
        'wiring.ends(but_activations=self._output == "auto")',
        "wiring.ends()",
        "predictive_coding layers",
    ),
    Mutation(
        "weights of no module are no weights",
        "program/layers.py",
        'self._output == "auto") - hidden',
        'self._output == "auto")',
        "layers",
    ),
    Mutation(
        "a network that holds a parameter is a weight behind its head",
        "program/wiring.py",
        "mark.weighted and not self._hands_on(mark, record.marks)",
        "mark.weighted",
        "layers",
    ),
    Mutation(
        "what is real at complex states is analytic",
        "network/analytic.py",
        "(1, 1j) if top.is_complex() else (1, 0)",
        "(1, 1j)",
        "code_complex",
    ),
    Mutation(
        "the check computes checkpoints again for good",
        "program/check.py",
        "nullcontext() if not record.notes else",
        "nullcontext() if True else",
        "purity",
    ),
    Mutation(
        "a loss keeps its shape",
        "program/interpreter.py",
        "seen.loss = held[self.loss].reshape(())",
        "seen.loss = held[self.loss]",
        "loss_shape",
    ),
    Mutation(
        "gradients are not compared",
        "program/check.py",
        "not bounds.explains(k, off, size):",
        "False:",
        "programs",
    ),
    Mutation(
        "rounding explains all",
        "program/rounding.py",
        "16 * self._noise[k]",
        "1e9 * self._noise[k]",
        "self_check",
    ),
    Mutation(
        "what cancels is as exact as what does not",
        "program/rounding.py",
        " + 16 * self._noise[k]",
        "",
        "self_check",
    ),
    Mutation(
        "what an operation with a state does is rounding",
        "program/rounding.py",
        "not self._moved(1.0)[k]",
        "True",
        "programs",
    ),
    Mutation(
        "errors of two children are one",
        "program/exact_rule.py",
        "else before if part is None else before + part",
        "else before",
        "layers recorder",
    ),
    Mutation(
        "a changed constant is not seen",
        "program/comparison.py",
        "else same_constant(old, new)",
        "else True",
        "programs",
    ),
    Mutation(
        "another operation is not seen",
        "program/comparison.py",
        "if one.func is not other.func and one.func != other.func:",
        "if False:",
        "programs",
    ),
    Mutation(
        "another parameter is not seen",
        "program/comparison.py",
        "return self._trail.takes(old, new)",
        "return True",
        "programs following",
    ),
    Mutation(
        "another wiring is not seen",
        "program/comparison.py",
        'return None if self._here[old] is new else "which tensors it uses"',
        "return None",
        "programs",
    ),
    Mutation(
        "other hooks are not seen", "program/comparison.py", "if hooked != {", "if False and hooked != {", "programs"
    ),
    Mutation(
        "writes are traced as they come",
        "program/tracer.py",
        "if functional is None or not self._is_own(tensors[0]):",
        "if functional is None:",
        "tracer",
    ),
    Mutation(
        "kinds of numbers are one to code",
        "program/tracer.py",
        "repr([type(a).__name__ for a in args])",
        '""',
        "tracer",
    ),
    Mutation(
        "random numbers are drawn once in code",
        "program/tracer.py",
        "again=kind.random or copies",
        "again=copies",
        "tracer",
    ),
    Mutation(
        "what the batch fixed is that of the first",
        "network/traced.py",
        "        self._before: dict[Key, list[Tensor]] = {}\n",
        "        self._before = self._traced.__dict__.setdefault('before', {})\n",
        "programs",
    ),
    Mutation(
        "settings of an energy are not looked at",
        "network/traced.py",
        "fixed = self._settings, self.batch_size, self.loss_scale",
        "fixed = self.batch_size, self.loss_scale",
        "programs",
    ),
    Mutation(
        "strengths share their code",
        "network/traced.py",
        "else (*own, strength, at_rest)",
        "else (*own, at_rest)",
        "code",
    ),
    Mutation(
        "code of the start is run everywhere",
        "network/traced.py",
        'at_rest = what.coordinates == "errors" and point[0] is self.no_errors[0]',
        'at_rest = what.coordinates == "errors"',
        "code",
    ),
    Mutation(
        "phases are written down in one weight",
        "network/traced.py",
        "shapes.append((*end.phase, end.internal",
        "shapes.append((end.strength, end.internal",
        "own_nudge",
    ),
    Mutation(
        "an update forgets its scale",
        "network/traced.py",
        "total = twin.update(rule, held, factor)",
        "total = twin.update(rule, held)",
        "predictive_coding conformance",
    ),
    Mutation(
        "two runs may differ",
        "step/second_run.py",
        "        if _fix_the_same(first, second):\n",
        "        if second:\n",
        "same_step",
    ),
    Mutation(
        "steps on gradients of backprop are taken",
        "strategies/manual.py",
        "if not relaxed and any(_teaches(p) for p in self._weights(module, parameters)):",
        "if False:",
        "same_step",
    ),
    Mutation(
        "another loss learns by backprop",
        "strategies/other_backward.py",
        "if reached(losses, inputs, module.parameters(), but=surrogate):",
        "if False:",
        "other_gradients",
    ),
    Mutation(
        "backward in a closure is let pass",
        "step/closure.py",
        'if options.get("inputs") is not None:\n        return False\n    raise',
        "if True:\n        return False\n    raise",
        "programs",
    ),
    Mutation(
        "followed constants are not compared",
        "program/following.py",
        "return same_constant(arg, known)",
        "return True",
        "following",
    ),
    Mutation(
        "followed operations are not compared",
        "program/following.py",
        "if node is not None and node.func is func and self._same_arguments(node, args, kwargs):",
        "if node is not None and self._same_arguments(node, args, kwargs):",
        "following",
    ),
    Mutation(
        "a followed write leaves other views what they held",
        "program/recorder.py",
        "            if now is not None:\n                self.contents.written",
        "            if False:\n                self.contents.written",
        "following",
    ),
    Mutation(
        "what shares memory is followed whatever it reads",
        "program/following.py",
        "node.results[0] if node.func is func and node.args == args else None",
        "node.results[0] if node.func is func else None",
        "following",
    ),
    Mutation(
        "followed values are not compared",
        "program/following.py",
        "if bound is not None and bound[1] is known and bound[0]() is arg:",
        "if bound is not None and bound[0]() is arg:",
        "following",
    ),
    Mutation(
        "passes that take turns are taken for each other",
        "program/following.py",
        "                if fits(node):\n",
        "                if True:\n",
        "following",
    ),
    Mutation(
        "parameters of passes that take turns are taken for each other",
        "program/following.py",
        "                self._trail = other  # it is asked for its parameters\n                if fits(node):\n",
        "                if fits(node):\n                    self._trail = other\n",
        "following",
    ),
    Mutation(
        "followed sizes are not compared",
        "program/following.py",
        "return (type(known) is int and arg == known) or",
        "return type(known) is int or",
        "following",
    ),
    Mutation(
        "errors that stand behind something else are taken for the network's",
        "relaxers/sweep.py",
        "isinstance(errors, ArrivingErrors) and errors.is_of(landscape)",
        "isinstance(errors, ArrivingErrors)",
        "one_pass",
    ),
    Mutation(
        "an update that is not linear is scaled before it is read",
        "updates/base.py",
        'update.linear_in_loss and is_kept(update, "linear_in_loss", "hold", "read")',
        "update.linear_in_loss",
        "one_pass",
    ),
    Mutation(
        "errors and update in one pass forget the factor",
        "network/network.py",
        "self.loss_scale * (self.first_loss.new_ones(()).real * scale), True",
        "self.loss_scale * self.first_loss.new_ones(()).real, True",
        "one_pass",
    ),
    Mutation(
        "two calls in one give what the first was asked for",
        "program/tracer.py",
        "tuple(map(operator.or_, before, asked))",
        "before",
        "one_pass",
    ),
    Mutation(
        "a product with -1 is no negative",
        "program/tracer.py",
        "                if self._is(other, -1) and",
        "                if False and",
        "one_pass",
    ),
    Mutation(
        "what is counted of states is a constant",
        "program/picked.py",
        "return not contents.is_choice(tensor) and not any",
        "return not any",
        "following",
    ),
    Mutation(
        "followed inputs are not compared",
        "program/following.py",
        "            return value is known\n",
        "            return True\n",
        "following",
    ),
    Mutation(
        "followed parameters are not compared",
        "program/following.py",
        "(leaf is not None and not self._trail.takes(known, tensor))",
        "False",
        "following",
    ),
    Mutation(
        "followed shapes are not compared",
        "program/following.py",
        "known.meta != outside_meta_of(tensor) or",
        "",
        "following",
    ),
    Mutation(
        "one input is followed twice",
        "program/following.py",
        "known not in self._taken and",
        "",
        "following",
    ),
    Mutation(
        "hooks of a followed pass are not compared",
        "program/comparison.py",
        "and hooked == self.hooked & self._values",
        "",
        "following",
    ),
    Mutation(
        "leaves that a followed pass makes are not compared",
        "program/comparison.py",
        "and made & self._values == self._made",
        "",
        "following",
    ),
    Mutation(
        "a call of another module is followed",
        "program/following.py",
        "(mark.module, mark.drive, mark.weighted) == was",
        "True",
        "following",
    ),
    Mutation(
        "a first step that says nothing is proof",
        "program/programs.py",
        "due = known.unchecked and not",
        "due = False and not",
        "custom_functions",
    ),
    Mutation(
        "views of what was overwritten are forgotten",
        "program/interpreter.py",
        "late.update(filter(None, node.results))",
        "pass",
        "meanwhile",
    ),
    Mutation(
        "a hook that is set on an object is the library's",
        "strategies/quiet.py",
        "return name in vars(one) or (",
        "return False or (",
        "meanwhile",
    ),
    Mutation(
        "calls that no operation stands for write unseen between a step and its gradient",
        "program/meanwhile.py",
        "elif func in MAY_WRITE:",
        "elif False:",
        "meanwhile",
    ),
    Mutation(
        "autograd's detection of anomalies is on in relaxations",
        "step/user_pass.py",
        "torch.autograd.set_detect_anomaly(False)",
        "torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled())",
        "settling",
    ),
    Mutation(
        "a drawn tensor keeps its other names",
        "program/contents.py",
        "for alias in [tensor, *self.others(tensor)]:\n            if self.known(alias) is value:",
        "for alias in [tensor]:\n            if self.known(alias) is value:",
        "following",
    ),
    Mutation(
        "detached names follow writes",
        "program/contents.py",
        "if not alias.requires_grad and base_of(alias) is not base_of(tensor):",
        "if False:",
        "following",
    ),
    Mutation(
        "leaves without a slope are taught nothing",
        "network/traced.py",
        "[slope is not None for slope in slopes]\n            return [slope for slope in slopes if slope is not None]",
        "[True for slope in slopes]\n"
        "            return [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, leaves, strict=True)]",
        "following",
    ),
    Mutation(
        "what is copied over has no slope",
        "program/operations.py",
        "return target.requires_grad and not target._is_view()",
        "return False",
        "following",
    ),
    Mutation(
        "leaves that both runs of a step make are not compared",
        "step/second_run.py",
        "return one is not None and one is another",
        "return one is not None",
        "following",
    ),
    Mutation(
        "a number stays that of the first step",
        "program/following.py",
        "        hold(known, number, self._record)\n",
        "        hold(known, known.number(1), self._record)\n",
        "numbers",
    ),
    Mutation(
        "a number decides the kind of a loss",
        "program/numbers.py",
        "torch.float64 if node.args[0].shape else node.args[0].meta[2]",
        "torch.float64",
        "numbers",
    ),
    Mutation(
        "a known program is never checked again",
        "program/programs.py",
        "if due or record.reads_graph or record.has_hooks or record.packs or program.overwritten():",
        "if due:",
        "seen_autograd",
    ),
    Mutation(
        "writes that autograd does not see are no matter",
        "program/interpreter.py",
        "if not (late := set(self.record.overwritten)):",
        "if True:",
        "unseen_memory",
    ),
    Mutation(
        "what hooks write to after a step is not copied",
        "program/meanwhile.py",
        "            self._record.inputs[value] = held.detach().clone()",
        "            pass",
        "meanwhile",
    ),
    Mutation(
        "draws have no slope, not even zero",
        "program/random_draws.py",
        "        return _drawn",
        "        return None",
        "draws",
    ),
    Mutation(
        "a masked weight is none",
        "program/locality.py",
        "if not others or _mixes(node, found, others, learned):",
        "if not others:",
        "own_weights",
    ),
    Mutation(
        "backward as a function is let pass",
        "program/seams.py",
        "if not recorder.takes_care(*pair, options)",
        "",
        "seen_autograd",
    ),
    Mutation(
        "code holds what it has read",
        "program/stage.py",
        "\\n    inputs.clear()",
        "",
        "tracer",
    ),
    Mutation(
        "operations run as they were written",
        "program/schedule.py",
        "return min(orders, key=",
        "return orders[0] if orders else min(orders, key=",
        "memory",
    ),
    Mutation(
        "all elements are the first one's number",
        "program/tracer.py",
        "return spreads and all(self.node(tensor) in self._uniform for tensor in tensors)",
        "return True",
        "code",
    ),
    Mutation(
        "the pass outlives its last reader",
        "step/user_pass.py",
        "self.let_go()\n        return Phases(",
        "return Phases(",
        "memory",
    ),
    Mutation(
        "means are sums", "program/batch_sums.py", "return reduction == SUM and", "return reduction and", "reduction"
    ),
    Mutation(
        "rows of folded samples take each other's steps",
        "network/samples.py",
        "values = values.repeat_interleave(folded)",
        "values = values.repeat(folded)",
        "closed_forms",
    ),
    Mutation(
        "a conjugate has the inverse slope",
        "energies/conjugates.py",
        "dual=lambda a: 0.5 * a * scaled(a, slope)",
        "dual=lambda a: 0.5 * a * scaled(a, 1 / slope)",
        "closed_forms",
    ),
    Mutation(
        "precisions learn twice as fast",
        "energies/learned_precision.py",
        "torch.exp(0.5 * self.rate",
        "torch.exp(self.rate",
        "closed_forms",
    ),
    Mutation(
        "increments forget the nudge",
        "step/increments.py",
        "End(nudged, Relaxation(states",
        "End(nudged._replace(weight=1.0), Relaxation(states",
        "closed_forms",
    ),
    Mutation(
        "samples go on from each other's states",
        "step/phases.py",
        "start = self._memory.recall(names, start)",
        "start = self._memory.recall(names[::-1], start)",
        "closed_forms",
    ),
    Mutation(
        "figures of relaxations are one rank's",
        "callbacks/relaxation_monitor.py",
        "if trainer.world_size > 1:  # the mean over devices",
        "if trainer.world_size < 1:  # the mean over devices",
        "distributed",
    ),
    Mutation(
        "an update reads one phase alone",
        "updates/contrast.py",
        "return network.terms_of(ends)",
        "return network.terms_of(ends[:1])",
        "own_update equilibrium_propagation",
    ),
    Mutation(
        "Bernoulli energies lose the entropy of what is off",
        "energies/bernoulli.py",
        "torch.xlogy(1 - state, 1 - state)",
        "torch.xlogy(1 - state, state)",
        "energies",
    ),
    Mutation(
        "Poisson responses fall where they are pulled",
        "energies/poisson.py",
        "layer.prediction * pull.exp()",
        "layer.prediction * (-pull).exp()",
        "energies",
    ),
    Mutation(
        "Huber's tails lose their offset",
        "energies/huber.py",
        "(error - 0.5 * inside)",
        "(error - 0.0 * inside)",
        "energies",
    ),
    Mutation(
        "a Laplace is as wide as its square",
        "energies/huber.py",
        "1 / (scale * delta)",
        "1 / (scale * scale * delta)",
        "energies",
    ),
    Mutation(
        "weak feedback is strong",
        "energies/hopfield.py",
        "self.feedback**-layer.above",
        "self.feedback**layer.above",
        "equilibrium_propagation coupled_and_contrastive",
    ),
    Mutation(
        "roots of a holomorphic nudge weigh alike",
        "nudges/holomorphic.py",
        "1 / (self.points * self.strength * root)",
        "1 / (self.points * self.strength)",
        "equilibrium_propagation own_nudge",
    ),
    Mutation(
        "a one-sided nudge forgets its free phase",
        "nudges/one_sided.py",
        "Phase(0.0, -1 / self.strength)",
        "Phase(0.0, 1 / self.strength)",
        "equilibrium_propagation",
    ),
    Mutation(
        "a negative side counts as a positive one",
        "nudges/random_sign.py",
        "return Phase(signed, 1 / signed)",
        "return Phase(signed, 1 / self.strength)",
        "equilibrium_propagation own_nudge closed_forms",
    ),
    Mutation(
        "coupled learning takes each side whole",
        "nudges/coupled.py",
        "Phase(self.eta, free / 2, True)",
        "Phase(self.eta, free, True)",
        "coupled_and_contrastive",
    ),
    Mutation(
        "two nudges of a dyad count as one",
        "updates/dyadic_contrast.py",
        "span = max(strengths) - min(strengths)",
        "span = max(strengths)",
        "dual_propagation",
    ),
    Mutation(
        "the linear response has no sign",
        "updates/linear_response.py",
        "residual = [-g for g in slope]",
        "residual = list(slope)",
        "infinitesimal_limit free_equilibrium",
    ),
    Mutation(
        "a saddle is taken for a minimum",
        "updates/linear_response.py",
        "if float(curvature) <= 0.0:",
        "if float(curvature) < -1e30:",
        "infinitesimal_limit free_equilibrium equilibrium_propagation",
    ),
    Mutation(
        "errors respond, and states above them do not",
        "updates/linear_response.py",
        "own[k] if slope is None else own[k] + slope",
        "own[k]",
        "linear_response",
    ),
    Mutation(
        "multipliers search among rounding",
        "relaxers/augmented_lagrangian.py",
        "strength, rounding * landscape.norms(multipliers))",
        "strength)",
        "rounding",
    ),
    Mutation(
        "means of pairs search among rounding",
        "relaxers/dyadic.py",
        "(self.tol * apart).maximum(rounding_of(landscape, mean))",
        "(self.tol * apart)",
        "rounding",
    ),
    Mutation(
        "a tensor returned twice carries two states",
        "program/calls.py",
        "found.setdefault(id(leaf), [])",
        "found.setdefault(place, [])",
        "tensors",
    ),
    Mutation(
        "multipliers are those of the last step",
        "relaxers/augmented_lagrangian.py",
        "[m + self.dual_lr * (r - m) for m, r in zip(held, read, strict=True)]",
        "list(point)",
        "multipliers",
    ),
    Mutation(
        "noise has the size of the temperature",
        "relaxers/langevin.py",
        "0.5 * math.sqrt(2 * self.temperature * self.lr)",
        "0.5 * math.sqrt(self.temperature * self.lr)",
        "langevin",
    ),
    Mutation(
        "samples are drawn while it heats",
        "relaxers/langevin.py",
        "if step > self.burn_in and (step - self.burn_in)",
        "if (step - self.burn_in)",
        "langevin",
    ),
    Mutation(
        "held units are pulled",
        "network/clamped_states.py",
        "torch.zeros_like(gradient) if self.units is None else gradient.masked_fill(self.units, 0.0)",
        "gradient",
        "clamp",
    ),
    Mutation(
        "masks hold the wrong units",
        "network/clamped_states.py",
        "torch.where(self.units, self.value, state)",
        "torch.where(self.units, state, self.value)",
        "clamp",
    ),
    Mutation(
        "units are held at nan",
        "network/clamp.py",
        "if not bool(torch.isfinite(hold.put(torch.zeros_like(value))).all()):",
        "if False:",
        "clamp",
    ),
    Mutation(
        "a dead reference has an error",
        "metrics.py",
        "torch.where(both, zero, torch.where(dead_r, inf, (difference / safe_rr).sqrt()))",
        "torch.where(dead_r, inf, (difference / safe_rr).sqrt())",
        "metrics",
    ),
    Mutation(
        "norms are not compared but squares",
        "metrics.py",
        "(gg / safe_rr).sqrt()",
        "(gg / safe_rr)",
        "metrics",
    ),
    Mutation(
        "nan in the batch is nobody's fault",
        "step/blame.py",
        "return bool(_spoiled(gradients.items()))",
        "return False",
        "bad_input faults",
    ),
    Mutation(
        "skipped batches are not counted",
        "step/divergence.py",
        "self.skipped += 1",
        "pass",
        "faults",
    ),
    Mutation(
        "a refused pass stays",
        "strategies/base.py",
        "        step.undo()\n        raise\n",
        "        raise\n",
        "resume faults",
    ),
    Mutation(
        "a batch that was cut off draws anew",
        "strategies/resume.py",
        "if done < batch.current.ready:",
        "if False:",
        "resume",
    ),
    Mutation(
        "checkpoints are written in place",
        "strategies/whole_files.py",
        "super().save_checkpoint(checkpoint, beside, storage_options)\n            beside.replace(path)",
        "super().save_checkpoint(checkpoint, path, storage_options)",
        "resume",
    ),
    Mutation(
        "one rank keeps to itself that it is told to end",
        "strategies/joint.py",
        "own = [status, self._preemption.came,",
        "own = [status, False,",
        "stopped",
    ),
    Mutation(
        "SIGTERM is handled wherever it finds a rank",
        "strategies/preemption.py",
        "signal.signal(signal.SIGTERM, self._keep)",
        "pass",
        "stopped",
    ),
    Mutation(
        "one update serves any number of steps",
        "strategies/manual.py",
        "                by.add(id(optimizer))",
        "                pass",
        "conformance",
    ),
    Mutation(
        "samples are remembered for ever",
        "step/state_memory.py",
        "while self._bytes > self._most:",
        "while False:",
        "closed_forms",
    ),
    Mutation(
        "the transposed network is not crossed",
        "program/products.py",
        "own[product.weight], back = back, fixed[product.weight]",
        "own[product.weight] = back",
        "asymmetric",
    ),
    Mutation(
        "the read-out is crossed as well",
        "program/interpreter.py",
        "if not (crossed and product.read_out)",
        "if True",
        "asymmetric",
    ),
    Mutation(
        "pulls push",
        "network/network.py",
        "terms.append(-self.per_sample(",
        "terms.append(self.per_sample(",
        "asymmetric",
    ),
    Mutation(
        "drives that are not linear are transposed all the same",
        "relaxers/feedback.py",
        "if share > 1e3 * landscape.rounding:",
        "if share > 1e30:",
        "asymmetric",
    ),
    Mutation(
        "the slope of a mean is not shared",
        "program/decompositions.py",
        "share = slope * (1 / (high * wide))",
        "share = slope * 1.0",
        "decompositions",
    ),
    Mutation(
        "windows that overlap are summed as if they did not",
        "program/decompositions.py",
        "covers = steps == (high, wide) and not any(padding)",
        "covers = not any(padding)",
        "decompositions",
    ),
    Mutation(
        "functions whose slope is another pass for slopes",
        "program/own_slopes.py",
        "return bool(abs(seen - told) <= _FAR * max(abs(seen), abs(told)))",
        "return True",
        "other_passes",
    ),
    Mutation(
        "memory that others write to is read once",
        "program/contents.py",
        "return not memory.resizable() or memory.data_ptr() in self._shared",
        "return not memory.resizable()",
        "unseen_memory",
    ),
    Mutation(
        "empty memory is an operation",
        "program/operations.py",
        "unfilled = name in _UNFILLED",
        "unfilled = False",
        "unseen_memory",
    ),
    Mutation(
        "steps that are only looked at count as taken",
        "step/step.py",
        "setup if teaches else setup.apart()",
        "setup",
        "observers unsettled",
    ),
    Mutation(
        "what was pooled is computed again",
        "program/tracer.py",
        'self.node(made).meta["in_place_of"]',
        'self.node(made).meta["elsewhere"]',
        "decompositions",
    ),
    Mutation(
        "steps are judged by the energy where forces are no slope of it",
        "relaxers/barzilai_borwein.py",
        "rose = rose & self.landscape.conservative",
        "rose = rose & True",
        "own_slopes",
    ),
    Mutation(
        "a batch that is relaxed as one is judged by the energy there",
        "relaxers/joint_descent.py",
        "or not self.landscape.conservative",
        "or False",
        "own_slopes",
    ),
    Mutation(
        "hooks of modules that change gradients are overlooked",
        "program/own_slopes.py",
        "isinstance(call, HookedCall) and call.changes",
        "isinstance(call, HookedCall) and not call.changes",
        "own_slopes",
    ),
    Mutation(
        "integers that a mask picks are computed again",
        "program/picked.py",
        "mask.dtype in _TRUTH and contents.is_choice(mask)",
        "mask.dtype not in _TRUTH and contents.is_choice(mask)",
        "picked",
    ),
    Mutation(
        "a mask is a constant only where it picks",
        "program/contents.py",
        "constant = self.constant(holding[0])",
        "constant = self.constant(holding[0].clone())",
        "picked",
    ),
    Mutation(
        "a scaled mean is a sum",
        "program/batch_sums.py",
        "return 0.0 if abs(factor) * self._size <= 1 + 1e-6 else factor",
        "return factor",
        "reduction",
    ),
    Mutation(
        "a loss of no parameter is relaxed",
        "strategies/manual.py",
        "return not leaves or any(id(leaf) in trained for leaf in leaves)",
        "return True",
        "other_gradients",
    ),
    Mutation(
        "reading grad_fn is laid at the user's door",
        "program/contents.py",
        "        with self._pausing():  # it is not the user who reads `grad_fn`",
        "        if True:",
        "unseen_memory",
    ),
]


def caught(copy: Path, tests: str) -> bool:
    """Whether these tests fail in that copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    files = [file for name in tests.split() if (copy / (file := f"tests/test_{name}.py")).exists()]
    if not files:
        raise SystemExit(f"There are no tests called {tests}: bring this list up to date.")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([*command, *files], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # not a verdict of the tests
        raise SystemExit(done.stdout + done.stderr)
    return done.returncode == 1


def main() -> int:
    """Number of sabotages that nobody noticed, of those named or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", help="names of sabotages")
    parser.add_argument("--json", type=Path, help="keeps the verdicts there")
    options = parser.parse_args()
    verdicts: dict[str, bool] = {}
    if options.json is not None and options.json.exists():
        verdicts = json.loads(options.json.read_text())["noticed"]
    chosen = [mutation for mutation in MUTATIONS if not options.chosen or mutation.what in options.chosen]
    mutations = [mutation for mutation in chosen if mutation.what not in verdicts]
    tests = " ".join(dict.fromkeys(name for mutation in mutations for name in mutation.tests.split()))
    if mutations and caught(ROOT, tests):
        raise SystemExit(f"Some of these fail without any sabotage: {tests}.")
    for mutation in mutations:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for part in (PACKAGE, "lightning_ebm_cli", "tests", "recipes", "benchmarks", "scripts"):
                shutil.copytree(ROOT / part, copy / part)
            shutil.copy(ROOT / "pyproject.toml", copy)
            target = copy / PACKAGE / mutation.file
            text = target.read_text()
            if mutation.text not in text:
                raise SystemExit(f"{mutation.file} no longer has {mutation.text!r}: bring this list up to date.")
            target.write_text(text.replace(mutation.text, mutation.sabotage))
            noticed = caught(copy, mutation.tests)
        verdicts[mutation.what] = noticed
        print(f"{'caught' if noticed else 'SURVIVED'}: {mutation.what} ({mutation.file})", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({"listed": len(MUTATIONS), "noticed": verdicts}, indent=1))
    return sum(not verdicts[mutation.what] for mutation in chosen)


if __name__ == "__main__":
    raise SystemExit(main())
