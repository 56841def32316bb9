"""The parts of the page, in their order."""

from collections.abc import Callable

from asked import asked
from automatic import automatic, passes
from equilibria import networks_people_have
from first import first_steps
from footprint import memory
from growth import scaling
from other_libraries import other_libraries
from page import Lines, Settings
from pooling import mean_pooling
from steps import steps
from sweeping import equilibrium_propagation
from under_trainer import under_the_trainer

SECTIONS: dict[str, Callable[[Settings], Lines]] = {
    "steps": steps,
    "questions": asked,
    "equilibria": networks_people_have,
    "ep": equilibrium_propagation,
    "peers": other_libraries,
    "trainer": under_the_trainer,
    "scaling": scaling,
    "first": first_steps,
    "memory": memory,
    "auto": automatic,
    "passes": passes,
    "pooling": mean_pooling,
}
