"""Where a model's weights rest on disk while it is not their turn.

A model that is larger than the memory is loaded hollow: its parameters have shapes but no data (device "meta"). They
are taken out of their files unit by unit, a decoder layer at a time, for the time of a `with` block. A unit that is
called while it rests takes its weights out by itself and puts them back after its forward, so a hollow model can be
called like any other: one forward reads every weight once, and holds one unit at a time.

Reading, renaming, converting and tying is all transformers' own: this begins where `from_pretrained` with everything
"on disk" ends, with the index of files that accelerate's hooks would read. The hooks themselves come off, since they
work module by module, and the walk wants whole layers, to be changed in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn

from llmprune.model.read_ahead import read_ahead

__all__ = ["Shelf", "shelf_of", "shelve"]

_ATTRIBUTE = "llmprune_shelf"

Place = dict[str, str]
"""A weight's file, its name there and the dtype that it is read in, as accelerate writes it down."""


class Shelf:
    """The weights of a hollow model.

    Parameters
    ----------
    model : its parameters are on "meta", but for those that `places` does not name
    places : by name of the parameter, tied ones under each of their names
    units : names of modules that are taken out as a whole; all other modules with weights are units by themselves
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], units: Sequence[str]) -> None:
        self.places = dict(places)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._hollow = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in places}
        self._out: set[str] = set()
        self.units: dict[str, list[str]] = {}
        """Name of a module → the names of the parameters that come and go with it."""
        for name in self._hollow:
            own = name.rpartition(".")[0]
            unit = next((unit for unit in units if name.startswith(f"{unit}.")), own)
            self.units.setdefault(unit, []).append(name)
        for unit in self.units:
            self._lie_in_wait(unit)

    @contextmanager
    def out(self, *units: str) -> Iterator[None]:
        """These units with their weights in memory, for a `with` block; those that are out already stay so after it.

        What is changed meanwhile is lost afterwards, unless `moved` tells where it was written.
        """
        fresh = [unit for unit in units if unit in self.units and unit not in self._out]
        try:
            for unit in fresh:
                self._take(unit)
            yield
        finally:
            for unit in fresh:
                self._put_back(unit)

    def moved(self, unit: str, file: Path) -> None:
        """From now on the unit's weights are read from `file`, where they lie by their names in the model."""
        for name in self.units.get(unit, ()):
            self.places[name] = {**self.places[name], "safetensors_file": str(file), "weight_name": name}

    def expect(self, unit: str) -> None:
        """The unit will be taken out next: its bytes are read from the disk meanwhile, if they have to be."""
        places = (self.places[name] for name in self.units.get(unit, ()))
        read_ahead((place["safetensors_file"], place["weight_name"]) for place in places if "safetensors_file" in place)

    def read(self, name: str) -> Tensor:
        """The parameter of this name, as its file has it: a private map of it, or a copy where the dtype is another."""
        tensor: Tensor = OffloadedWeightsLoader(index=self.places)[name]
        return tensor

    def _take(self, unit: str) -> None:
        self._out.add(unit)
        self._modules[unit].__dict__.pop("forward", None)
        tied = {id(self._hollow[name]): p for other in self._out - {unit} for name, p in self._held(other)}
        for name in self.units[unit]:
            hollow = self._hollow[name]
            if id(hollow) not in tied:
                tied[id(hollow)] = nn.Parameter(self.read(name), requires_grad=hollow.requires_grad)
            self._set(name, tied[id(hollow)])

    def _put_back(self, unit: str) -> None:
        for name in self.units[unit]:
            self._set(name, self._hollow[name])
        self._out.discard(unit)
        self._lie_in_wait(unit)

    def _held(self, unit: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, self._owner(name)[name.rpartition(".")[2]]) for name in self.units[unit]]

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        self._owner(name)[name.rpartition(".")[2]] = parameter

    def _owner(self, name: str) -> dict[str, Any]:
        parameters: dict[str, Any] = self._modules[name.rpartition(".")[0]]._parameters
        return parameters

    def _lie_in_wait(self, unit: str) -> None:
        """The unit's forward, while it rests: out of the shelf, through the module, and back."""
        module = self._modules[unit]

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.out(unit):
                return module.forward(*args, **kwargs)

        module.forward = forward


def shelf_of(model: nn.Module) -> Shelf | None:
    """The shelf of a hollow model; None for one whose weights are in memory."""
    return vars(model).get(_ATTRIBUTE)


def shelve(model: nn.Module, units: Sequence[str]) -> Shelf:
    """Give a shelf to a model that `from_pretrained(device_map={"": "disk"})` has just made.

    `units` names the modules whose weights come and go together.
    """
    places = _index(model)
    remove_hook_from_submodules(model)
    for module in model.modules():
        forward = vars(module).get("forward")
        if getattr(forward, "__func__", None) is type(module).forward:  # accelerate puts back what it found, bound
            del vars(module)["forward"]
    vars(model).pop("hf_device_map", None)
    shelf = Shelf(model, places, units)
    vars(model)[_ATTRIBUTE] = shelf  # goes with the model
    return shelf


def _index(model: nn.Module) -> Mapping[str, Place]:
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    held = next(found for hook in hooks if (found := getattr(hook, "weights_map", None)) is not None)
    while hasattr(held, "dataset"):  # accelerate wraps the whole in views on a part of its names
        held = held.dataset
    index: Mapping[str, Place] = held.index
    return index
