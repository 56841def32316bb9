"""What proves our rules, offered for yours."""

from lightning_ebm.testing.algorithm import check_algorithm
from lightning_ebm.testing.limit import check_limit
from lightning_ebm.testing.locality import check_locality

__all__ = ["check_algorithm", "check_limit", "check_locality"]
