"""Numbers of things in a sentence."""


def counted(number: int, noun: str) -> str:
    """A number, and what it is a number of, as in "1 layer" and "2 layers"."""
    return f"{number} {noun}{'s' * (number != 1)}"
