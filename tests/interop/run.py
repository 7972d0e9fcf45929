"""Adapters to and from upstream's package: what one library saves, the other loads, with the same results.

Upstream's package gets an environment of its own, `.venv-upstream`, beside ours: a second copy of nothing but `peft`,
which sees all other packages of the environment that runs this file. Both libraries then run the same cases
(`cases.py`) on the same random base models, in processes of their own (`worker.py`), and their reports are compared
here:

- *alike*: class, parameter names, shapes and dtypes, what trains, printed counts, status, keys of the state dict, files
  and configurations of a new adapter;
- *upstream -> ours* and *ours -> upstream*: outputs of each adapter, of a mixed batch, without the adapters and after
  merging; the tensors, the configuration when saved again, and what trains after loading.

Prints a table and what failed; exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from cases import CASES, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / ".venv-upstream"
UPSTREAM = "peft==0.21.2"
LIBRARIES = ("ours", "upstream")

# Keys of adapter_config.json whose values tell the libraries apart.
DIFFERENT_CONFIG = {"peft_version"}
# A file of ours alone, with which the training of a computed prompt goes on.
OUR_FILES = {"prompt_network.safetensors"}


def upstream_python() -> str:
    """The interpreter of upstream's environment, which is made if it is not there."""
    python = ENVIRONMENT / "bin/python"
    done = ENVIRONMENT / "installed"
    if not done.exists():
        print(f"making {ENVIRONMENT.name} with {UPSTREAM}", flush=True)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", UPSTREAM], check=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)})
        # Its own packages come first, so that `peft` is upstream's and all else ours.
        Path(packages, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        done.write_text(UPSTREAM + "\n", encoding="utf-8")
    return str(python)


def work(python: str, library: str, arguments: list[str]) -> None:
    """Run the worker."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONPATH", None)
    if library == "ours":
        environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [python, str(HERE / "worker.py"), *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"worker.py {' '.join(arguments)} failed with {python}:\n{done.stderr}")


def check_versions(folder: Path) -> None:
    """Both libraries took part, each in its own environment."""
    versions = {library: (folder / f"save {library}" / "version.txt").read_text() for library in LIBRARIES}
    if versions["upstream"] != UPSTREAM.partition("==")[2] or "+sft" not in versions["ours"]:
        raise SystemExit(f"The environments do not hold the libraries that they should: {versions}")
    print(f"ours {versions['ours']}, upstream {versions['upstream']}")


def differences(ours, upstream, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line each."""
    if isinstance(ours, dict) and isinstance(upstream, dict):
        for key in sorted({*ours, *upstream}):
            here = f"{path}.{key}" if path else key
            if key not in ours or key not in upstream:
                yield f"{here} only {'upstream' if key in upstream else 'ours'}"
            else:
                yield from differences(ours[key], upstream[key], here)
    elif ours != upstream:
        yield f"{path}: ours {ours!r}, upstream {upstream!r}"


def comparable(config: dict) -> dict:
    """A configuration with lists, which all stand for sets, in one order and without repetitions."""
    return {
        key: sorted({str(item) for item in value}) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in DIFFERENT_CONFIG
    }


def check_alike(case: Case, ours: dict, upstream: dict) -> Iterator[str]:
    """What is wrong with two libraries' reports on one new adapter."""
    for library, report in zip(LIBRARIES, (ours, upstream)):
        if "error" in report:
            yield f"{library}: {report['error']}"
    if "error" in ours or "error" in upstream:
        return
    for report in (ours, upstream):
        report["configs"] = {name: comparable(config) for name, config in report["configs"].items()}
        for status in report["layer_status"]:  # "lora.Linear", but for some of upstream's methods "Linear" alone
            status["module_type"] = status["module_type"].rpartition(".")[2]
        report["layer_status"] = {status["name"]: status for status in report["layer_status"]}
        report["files"] = {name: sorted({*files} - OUR_FILES) for name, files in report["files"].items()}
        del report["warnings"]
        if not case.upstream_freezes and len(case.adapters) > 1:
            del report["printed"]
            report["parameters"] = {name: facts[:-1] for name, facts in report["parameters"].items()}
    yield from differences(ours, upstream)


def check_loaded(case: Case, library: str, saved: dict, loaded: dict) -> Iterator[str]:
    """What is wrong with the report of `library` on having loaded the other's adapters."""
    if "error" in loaded:
        yield loaded["error"]
        return
    if loaded["spread"] < 100 * case.tolerance and case.tolerance <= 1e-4:
        yield f"the adapter changes the outputs by only {loaded['spread']:.1e}: a bad test"
    computed = dict(loaded["differences"])
    if not case.is_prompt and (library == "ours" or case.upstream_merges):
        computed["(merged)"] = loaded["merged_difference"]
    for what, difference in computed.items():
        if not difference <= case.tolerance:
            yield f"outputs of {what} differ by {difference:.1e}, allowed are {case.tolerance:.0e}"
    for name, keys in loaded["tensors"].items():
        if keys:
            yield f"{len(keys)} tensors of {name!r} are not as saved: {keys[:4]}"
    for name, config in loaded["configs"].items():
        for line in differences(comparable(config), comparable(saved["configs"][name])):
            yield f"configuration of {name!r}, saved again: {line.replace('upstream', 'before')}"
    trained = {name for name, (*_, trains) in saved["parameters"].items() if trains}
    if not case.is_prompt and {*loaded["trainable"]} != trained:
        other = sorted({*loaded["trainable"]} ^ trained)
        yield f"loaded for training, {len(other)} parameters train in only one of the libraries: {other[:4]}"
    if loaded["class"] != saved["class"]:
        yield f"loaded as {loaded['class']}, saved as {saved['class']}"


def run_workers(folder: Path, seed: int) -> None:
    pythons = {"ours": sys.executable, "upstream": upstream_python()}
    work(pythons["ours"], "ours", ["bases", str(folder), str(seed)])
    for library in LIBRARIES:
        work(pythons[library], library, ["save", str(folder), library])
    check_versions(folder)
    for library, other in (LIBRARIES, LIBRARIES[::-1]):
        work(pythons[library], library, ["load", str(folder), library, other])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the base models")
    parser.add_argument("--keep", metavar="FOLDER", help="write the adapters and reports there, and keep them")
    args = parser.parse_args()
    if args.keep and os.path.isdir(args.keep) and os.listdir(args.keep):
        parser.error(f"--keep takes a new or empty folder, got {args.keep}")
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run_workers(folder, args.seed)

        def read(kind: str, case: Case) -> dict:
            return json.loads((folder / kind / f"{case.name}.json").read_text())

        columns = ("alike", "upstream -> ours", "ours -> upstream")
        width = max(len(case.name) for case in CASES)
        print(f"\n{'':{width}}  " + "  ".join(f"{column:>16}" for column in columns))
        failures: list[str] = []
        for case in CASES:
            ours, upstream = read("save ours", case), read("save upstream", case)
            found = [list(check_alike(case, ours, upstream))]
            for library, saved in (("ours", upstream), ("upstream", ours)):
                loaded = read(f"load {library} {'upstream' if library == 'ours' else 'ours'}", case)
                found.append(["not saved"] if "error" in saved else list(check_loaded(case, library, saved, loaded)))
            marks = "  ".join(f"{'FAIL' if lines else 'ok':>16}" for lines in found)
            print(f"{case.name:{width}}  {marks}")
            failures += [f"{case.name}, {c}: {line}" for c, lines in zip(columns, found) for line in lines]
    print(f"\n{len(failures)} differences" if failures else "\nall alike")
    for line in failures:
        print(f"- {line}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
