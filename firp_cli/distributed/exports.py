"""Environment of ranks on other machines: which variables the launcher sends there, and which secrets it does not.

DeepSpeed's runner writes exported variables on the command lines of pdsh and ssh, which every user of a machine can
read. So nothing that may be a secret is exported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from firp_cli.errors import UsageError, first_line

LOG = logging.getLogger("firp")  # commands print it on stderr
ENVIRONMENT_FILE = "DS_ENV_FILE"  # variable: the runner's file of variables, which it looks up in two folders
DEFAULT_FILE = ".deepspeed_env"
EXPORTS = "FIRP_EXPORTS"  # text of that file, until it is written
PREFIXES = (
    *("FIRP_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_", "WANDB_", "VLLM_"),
    *("OMP_", "MKL_", "KMP_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_"),
)
NAMES = (
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy"),
    *("requests_ca_bundle", "curl_ca_bundle", "ssl_cert_file", "ssl_cert_dir"),
)
RUNNERS_OWN = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # prefixes of variables that the runner exports itself
OF_THIS_MACHINE = ("FIRP_FAILURE_FILE", EXPORTS)
SECRET_NAME = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/@\s]+@")  # an address with a password or a token


def exported_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the runner, with the variables for other machines as text under `EXPORTS`.

    Variables that may be secrets are left out; one line that is logged names them. The runner's own file of variables
    (`.deepspeed_env`, or the one that DS_ENV_FILE names) is kept and decides where both have a variable.
    """
    chosen = {key: value for key, value in environment.items() if _is_exported(key)}
    secret = sorted(key for key, value in chosen.items() if SECRET_NAME.search(key) or SECRET_VALUE.search(value))
    if secret:
        LOG.info(
            f"not sent to the other machines, because command lines are visible to other users: {', '.join(secret)}; "
            "log in on each machine (hf auth login, wandb login), or set them in its shell's start-up file"
        )
    lines = []
    for key, value in chosen.items():
        if key in secret or key in OF_THIS_MACHINE or key.startswith(RUNNERS_OWN):
            continue
        if "\n" in value:
            LOG.info(f"not sent to the other machines, since it has several lines: {key}")
            continue
        lines.append(f"{key}={_quoted(value)}\n")
    lines += _own_file(environment)
    return {key: value for key, value in environment.items() if key not in secret} | {EXPORTS: "".join(lines)}


def _is_exported(key: str) -> bool:
    return key.startswith((*PREFIXES, *RUNNERS_OWN)) or key.lower() in NAMES


def _quoted(value: str) -> str:
    """Return a value as the runner takes it: it puts one that needs them in quotation marks, and escapes nothing."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _own_file(environment: Mapping[str, str]) -> list[str]:
    """Return the lines of the user's own file of variables, which the runner would read from these two folders."""
    name = environment.get(ENVIRONMENT_FILE, DEFAULT_FILE)
    files = dict.fromkeys((folder / name).absolute() for folder in (Path.home(), Path()))
    try:
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the launcher's file of variables, {name}, cannot be read: {first_line(error)}") from None
    return [f"{line}\n" for text in texts for line in text.splitlines() if "=" in line]
