"""Strategies: where and on how many devices a Trainer trains. One a file; here Lightning's names are imported."""

from lightning_ebm.strategies.base import EnergyStrategy, strategy_of
from lightning_ebm.strategies.ddp import EBMDDPStrategy
from lightning_ebm.strategies.fsdp2 import EBMFSDP2Strategy
from lightning_ebm.strategies.joint import JointStrategy
from lightning_ebm.strategies.single_device import EBMStrategy

__all__ = ["EBMDDPStrategy", "EBMFSDP2Strategy", "EBMStrategy", "EnergyStrategy", "JointStrategy", "strategy_of"]
