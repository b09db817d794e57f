"""What every stage of the study has: its folders and sizes, and the commands of the package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.sets import KINDS, Sizes
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, message

MODEL = ("--model", "smollm2", "--max-length", "512")
INDICATORS = "length_input,length_output,ppl,ifd,mtld,knn_6,reward,loss_drop,gradient_similarity"
FORCE = "--force=weak-rule,worse-target"
"""The plan compares the rule whatever its runs say of it; what was forced stands in the result."""


@dataclass(frozen=True)
class Study:
    """Where the study's files are, and how large it is.

    Args:
        data: Folder of the sources' rows.
        out: Folder of everything that the stages write.
        sizes: The study's, or those of a trial.
        kept: Folder of the numbers that the repository has; a trial's are in `out`.
        jobs: Runs at a time, in the stages that make many.
    """

    data: Path
    out: Path
    sizes: Sizes
    kept: Path
    jobs: int = 1

    def at(self, *parts: str) -> str:
        return str(self.out.joinpath(*parts).resolve())

    def sets(self, name: str) -> dict[str, str]:
        """kind → file of "fit" or "search"."""
        return {kind: self.at("data", name, f"{kind}.jsonl") for kind in sorted(KINDS)}

    def command(self, *arguments: str) -> None:
        """Runs one command of the package in the study's folder, and prints it first.

        Raises:
            InstructMiningError: it did not end with 0.
        """
        log(f"im-lightning {' '.join(arguments)}".replace(f"{self.out.resolve()}/", ""))
        status = subprocess.run(
            [sys.executable, "-m", "im_lightning", *arguments], cwd=self.out, check=False
        ).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise InstructMiningError(
                message(f"im-lightning {arguments[0]}", f"it ended with {status}", "see above; the same stage goes on")
            )
