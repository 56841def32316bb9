"""What can go wrong, one class for each kind of remedy."""


class EBMError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigurationError(EBMError, ValueError):
    """The request cannot work as written: change the arguments, the algorithm or what the closure returns."""


class LayerDiscoveryError(EBMError):
    """The layers could not be found or changed between passes: name them with ``layers=`` and ``output=``."""


class UnsupportedModuleError(EBMError):
    """A module does something that no energy of its states can express: replace it or leave it out of ``layers=``."""


class RelaxationDivergedError(EBMError):
    """States ran away instead of relaxing, or were asked to descend a loss that is not a finite number."""
