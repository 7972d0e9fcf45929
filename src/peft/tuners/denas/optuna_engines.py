"""Optuna's samplers as engines: TPE for one objective, NSGA-II for several, with a storage to share and to go on from.

Optuna proposes sizes and switches freely; a proposal is brought into the budget of parameters before it is scored, by
random steps that depend on nothing but the seed and the trial's number. The samplers are seeded the same way, anew for
each trial, so that a search that was killed goes on as if nothing had happened (but for the structure that it was just
scoring, which nobody scores then).

Processes that share a storage claim a structure before they score it. Of two that claim the same one at the same time
neither scores it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .config import DenasConfig
from .structure import SIZES, parse_structure

if TYPE_CHECKING:
    import optuna

    from .search import Record, Search

STRUCTURE, SETTINGS = "structure", "settings"
_NOT_THE_SEARCHS_OWN = ("storage", "study_name", "max_epochs", "patience", "seed")
"""Settings that may differ between processes that search together, or when a search goes on."""


def search_with_optuna(search: Search) -> None:
    """Run or go on with a study until it has `max_epochs * population_num` trials.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the storage holds a search with other settings.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            f"engine={search.config.engine!r} needs the package optuna: pip install 'peft[denas]', or pip install "
            "optuna; the other engines do without"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _open(optuna, search)
    known = set()
    salt = 0

    def take_over() -> None:
        """Remember what has been scored, here, by earlier runs or by other processes."""
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            if trial.number not in known:
                known.add(trial.number)
                _remember(search, trial)

    take_over()
    size = search.config.population_num
    for _ in search.rounds():
        for _ in range(size):
            if len(study.get_trials(deepcopy=False)) >= search.config.max_epochs * size:
                break
            salt = _try_one(optuna, study, search, salt, take_over)
    take_over()
    if search.config.engine == "nsga2":
        search.front = pareto_front(search.history, search.config.objectives)


def _open(optuna, search: Search) -> optuna.Study:
    config = search.config
    directions = {"score": "maximize", "params": "minimize", "latency": "minimize"}
    goals = config.objectives if config.engine == "nsga2" else ["score"]
    study = optuna.create_study(
        storage=_storage(optuna, config.storage),
        study_name=config.study_name,
        load_if_exists=config.storage is not None,
        directions=[directions[goal] for goal in goals],
    )
    settings = _settings(search)
    found = study.user_attrs.get(SETTINGS)
    if found is None:
        study.set_user_attr(SETTINGS, settings)
    elif found != settings:
        differ = sorted(name for name in settings if settings[name] != found.get(name))
        raise ValueError(
            f"The study {config.study_name!r} in {config.storage} is a search with other settings ({differ}): take "
            "the same ones, another study_name, or another storage"
        )
    return study


def _settings(search: Search) -> dict:
    """What all processes of a search must agree on."""
    config, space = search.config, search.space
    own = {name: value for name, value in vars(config).items() if name not in _NOT_THE_SEARCHS_OWN}
    own |= {"method": space.method.value, "targets": [[unit.layer, list(unit.keys)] for unit in space.units]}
    own |= {"budget": [search.budget.max_params, search.budget.min_params], "costs": zlib.crc32(space.costs.tobytes())}
    own |= {"alpha": space.values[1:], "model or data": search.data}
    if not config.is_additive:
        own["seed"] = config.seed  # of the deltas that are scored
    return json.loads(json.dumps(own))


def _storage(optuna, where: str | None):
    """Optuna's storage of this name.

    Raises:
        ValueError: it cannot be opened, or is something else.
    """
    if where is None:
        return None
    storages = optuna.storages
    try:
        if "://" in where:
            return storages.get_storage(where)
        return storages.JournalStorage(storages.journal.JournalFileBackend(where))
    except Exception as error:  # every driver of a database has its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"storage {where!r} is no journal file or database that can be opened ({reason})") from error


def _sampler(optuna, config: DenasConfig, number: int, salt: int):
    seed = int(np.random.SeedSequence([config.seed, number, salt]).generate_state(1)[0])
    if config.engine == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(20, config.population_num))
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=config.population_num)


def _try_one(optuna, study: optuna.Study, search: Search, salt: int, take_over: Callable[[], None]) -> int:
    """Ask for a proposal, score it, tell. Returns the salt of the next one's seed.

    The sampler must be seeded before the trial has its number. Two processes that expect the same number would draw the
    same proposals from then on; so who gets another one than it expected draws differently ever after.
    """
    expected = len(study.get_trials(deepcopy=False))
    study.sampler = _sampler(optuna, search.config, expected, salt)
    trial = study.ask()
    rng = np.random.default_rng([search.config.seed, trial.number])
    codes = search.space.fit(_suggest(trial, search), search.budget, rng)
    claimed = codes is not None and _claim(optuna, study, trial, search, codes)
    take_over()  # after the claim: what was scored until then is known, what is being scored has been seen above
    record = search.evaluate(codes) if claimed else None
    if record is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        trial.set_user_attr("record", [record.score, record.params, record.latency])
        study.tell(trial, objectives_of(record, search.config))
    return salt if trial.number == expected else trial.number


def _claim(optuna, study: optuna.Study, trial: optuna.Trial, search: Search, codes: np.ndarray) -> bool:
    """Say what this trial is going to score; False: another process has said the same and is at it."""
    structure = search.space.to_dict(codes)
    trial.set_user_attr(STRUCTURE, structure)
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    others = (other for other in running if other.number != trial.number)
    return all(other.user_attrs.get(STRUCTURE) != structure for other in others)


def objectives_of(record: Record, config: DenasConfig) -> list[float]:
    """What Optuna is told of a candidate."""
    return [getattr(record, name) for name in (config.objectives or ("score",))]


def _suggest(trial: optuna.Trial, search: Search) -> np.ndarray:
    space = search.space
    codes = np.zeros((len(space.units), 1 + len(space.values)), dtype=np.int64)
    for i in np.flatnonzero(space.usable):
        codes[i, 0] = trial.suggest_int(f"on_{i}", 0, 1)
        for d, (name, values) in enumerate(zip(SIZES[space.method], space.values), start=1):
            codes[i, d] = trial.suggest_int(f"{name}_{i}", 0, len(values) - 1)
    return space.canonical(codes)


def _remember(search: Search, trial: optuna.trial.FrozenTrial) -> None:
    from .search import Record

    structure = parse_structure(trial.user_attrs[STRUCTURE], search.space.layout, search.space.method)
    codes = search.space.encode(structure)
    if search.seen.get(codes.tobytes()) is None:
        search.remember(Record(codes, *trial.user_attrs["record"]))


def pareto_front(records: list[Record], objectives: list[str]) -> list[Record]:
    """The records that no other one equals or beats in every objective, by falling score; of equals the first."""
    signs = {"score": -1, "params": 1, "latency": 1}
    points = [tuple(signs[name] * getattr(record, name) for name in objectives) for record in records]
    front, taken = [], set()
    for point, record in sorted(zip(points, records), key=lambda pair: pair[0]):
        beaten = any(all(a <= b for a, b in zip(other, point)) and other != point for other in points)
        if not beaten and point not in taken:
            taken.add(point)
            front.append(record)
    return front
