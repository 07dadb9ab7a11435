"""What a published checkpoint names beside numbers, and the inert classes that stand in for it.

Settings and label maps are OmegaConf objects and a logger. None of these packages is imported: a stand-in stores what
it is given and does nothing, and `plain` reads settings out of what was stored.
"""

from typing import Any, Self

from hilbertcell.inference.perturbdiff.torch_archive import CheckpointError

ALLOWED = {
    "torch._utils._rebuild_tensor_v2": "makes a view of a storage: the arrays themselves",
    "collections.OrderedDict": "state_dict is one",
    "omegaconf.dictconfig.DictConfig": "settings: a mapping",
    "omegaconf.listconfig.ListConfig": "settings: a list",
    "omegaconf.nodes.AnyNode": "settings: one value",
    "omegaconf.base.ContainerMetadata": "what OmegaConf notes of a mapping or list; not looked at",
    "omegaconf.base.Metadata": "what OmegaConf notes of a value; not looked at",
    "collections.defaultdict": "the empty cache within that metadata",
    "typing.Any": "a type noted within that metadata",
    "builtins.dict": "likewise",
    "builtins.list": "likewise",
    "builtins.int": "likewise",
    "builtins.str": "likewise",
    "logging.getLogger": "hyper_parameters hold a logger; only its name is kept",
    "logging.Logger": "how older Pythons stored a logger",
}
_TORCH_KNOWS = {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict"}
_MAX_DEPTH = 32
_VALUES = (str, int, float, bool, type(None))


class StandIn:
    """Stores the arguments it is called with and the state it is given."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """Keep `args`."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any) -> None:
        """Nothing else."""

    def __setstate__(self, state: Any) -> None:
        """Keep `state`."""
        self.state = state


STAND_INS: dict[str, type[StandIn]] = {
    name: type(name.rpartition(".")[2], (StandIn,), {}) for name in ALLOWED if name not in _TORCH_KNOWS
}


def safe_globals() -> list[tuple[type[StandIn], str]]:
    """The argument of `torch.serialization.safe_globals`."""
    return [(stand_in, name) for name, stand_in in STAND_INS.items()]


def plain(value: Any, name: str = "hyper_parameters", depth: int = 0) -> Any:
    """Settings as dictionaries, lists and values; interpolations stay text, a logger becomes its name.

    Raises:
        CheckpointError: naming the entry that is something else, or holds something else than it must.
    """
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{name}: settings are nested more than {_MAX_DEPTH} deep")
    if isinstance(value, STAND_INS["logging.getLogger"] | STAND_INS["logging.Logger"]):
        return value.args[0] if value.args and isinstance(value.args[0], str) else None
    if isinstance(value, StandIn):
        inside = _content(value, name)
        return plain(inside, name, depth + 1)
    if isinstance(value, dict):
        wrong = [key for key in value if not isinstance(key, str | int)]
        if wrong:
            raise CheckpointError(f"{name}: has a key of {type(wrong[0]).__name__}, expected text")
        return {str(key): plain(entry, f"{name}.{key}", depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, f"{name}[{i}]", depth + 1) for i, entry in enumerate(value)]
    if type(value) not in _VALUES:
        raise CheckpointError(f"{name}: is a {type(value).__name__}, expected a setting")
    return value


def _content(value: StandIn, name: str) -> Any:
    """What a stored mapping, list or value of settings holds."""
    expected: dict[type[StandIn], tuple[str, tuple[type, ...]]] = {
        STAND_INS["omegaconf.dictconfig.DictConfig"]: ("_content", (dict, str, type(None))),
        STAND_INS["omegaconf.listconfig.ListConfig"]: ("_content", (list, str, type(None))),
        STAND_INS["omegaconf.nodes.AnyNode"]: ("_val", _VALUES),
    }
    if type(value) not in expected:
        raise CheckpointError(f"{name}: is a {type(value).__name__}, expected a setting")
    entry, kinds = expected[type(value)]
    state = value.state
    if not isinstance(state, dict) or entry not in state or not isinstance(state[entry], kinds):
        raise CheckpointError(f"{name}: a {type(value).__name__} does not hold what one holds")
    return state[entry]
