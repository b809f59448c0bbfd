#!/usr/bin/env python3
"""The demo: collect, train, eval and bench on the embedded teachers, as a user would type it.

Everything it makes lies in stores/demo, stores/demo-looped and the output folder; a second run starts afresh and
removes them first.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPES = {"firp": "demo", "hidden_transfer": "demo-hidden_transfer", "medusa": "demo-medusa", "speed": "demo-speed"}
STORE = Path("stores/demo")
LOOPED_STORE = Path("stores/demo-looped")  # SPEED's teacher shares its layers: it answers and is measured by itself


def commands(output: Path, prompts: int, repeats: int) -> list[list[str]]:
    """The command lines of the demo, in order."""
    firp = str(Path(sys.executable).with_name("firp"))
    counts = ["--limit", str(prompts), "--repeats", str(repeats)]
    predictors = [str(output / kind) for kind in RECIPES]
    stores = {kind: LOOPED_STORE if kind == "speed" else STORE for kind in RECIPES}
    return [
        [firp, "collect", "demo", f"store={STORE}"],
        [firp, "collect", "demo-speed", f"store={LOOPED_STORE}"],
        *(
            [firp, "train", recipe, f"store={stores[kind]}", f"output={output / kind}"]
            for kind, recipe in RECIPES.items()
        ),
        [firp, "eval", predictors[0], "--store", str(STORE), "--limit", "200", "--output", str(output / "eval")],
        [firp, "bench", *predictors, "--dataset", "arithmetic", "--output", str(output / "bench"), *counts],
    ]


def main() -> int:
    """Run the demo; returns the exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--prompts", type=int, default=20, help="prompts that bench decodes (default 20)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the bench (default 3)")
    arguments = parser.parse_args()
    for folder in (STORE, LOOPED_STORE, arguments.output):
        if folder.exists():
            print(f"removing {folder} of an earlier demo", flush=True)
            shutil.rmtree(folder)
    began = time.monotonic()
    for command in commands(arguments.output, arguments.prompts, arguments.repeats):
        shown = ["firp", *command[1:]]
        print(f"\n[{time.monotonic() - began:.0f} s] $ {shlex.join(shown)}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    page = (arguments.output / "bench" / "bench.html").resolve()
    print(f"\ndone in {time.monotonic() - began:.0f} s; the report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
