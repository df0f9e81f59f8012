"""`m2f2 demo`: the whole path, small, in one process: data, three stages, questions, scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from llava.core.config import setting
from llava.core.weights import checkpoints_dir
from llava.pipeline.settings import DEMO_MODEL


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration learns from, and where it writes."""

    data: str | None = setting(
        None,
        "folder of your own: DD-VQA (annotations/DQ_FFpp, images/c40) or class folders {train,val,test}/{real,fake}; "
        "none = forgeries of the four embedded photos",
    )
    output: str = setting("outputs/demo", "folder of everything that is made on the way")
    model: str | None = setting(
        None, "name of the finished explainer in checkpoints/; none = demo, or demo-FOLDER for data of one's own"
    )
    recipe: str = setting(
        "scripts/configs/demo.yaml", "what is forged and how long is trained, without data of one's own"
    )

    @property
    def explainer(self) -> Path:
        """Give the folder of the finished explainer."""
        own = DEMO_MODEL if self.data is None else f"{DEMO_MODEL}-{Path(self.data).resolve().name}"
        return checkpoints_dir() / (self.model or own)


def run_demo(config: DemoConfig) -> Iterator[str]:
    """Run the whole path; yields the scores and where everything is.

    Raises ValueError where a step fails, and where another run writes to the same folder.
    """
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield from _run(config, out)
    except Timeout:
        raise ValueError(f"output: another run writes to {str(out)!r} now; wait for it, or give --output.") from None


def _run(config: DemoConfig, out: Path) -> Iterator[str]:
    # here, so that --help does not wait for the libraries that train
    from llava.core.runtime import write_json
    from llava.evaluation.compare import comparison
    from llava.evaluation.report import text_of
    from llava.pipeline.demo_data import prepare
    from llava.pipeline.demo_report import write_report
    from llava.pipeline.demo_steps import Clock, answer, judge_answers, train

    clock, explainer = Clock(), config.explainer
    plan = clock.run("data", lambda: prepare(config.data, config.recipe, out))
    train(plan, out, explainer, clock)
    answer(plan, out, explainer, clock)
    clock.run("scores", lambda: judge_answers(plan, out))
    if config.data is None:
        clock.run("report", lambda: write_report(out, explainer, clock.seconds))
        yield f"The report is {out / 'report.html'}: open it in a browser. This model is a demonstration and no tool.\n"
    write_json(out / "seconds.json", clock.seconds)
    yield text_of(comparison([out]))
    minutes = sum(clock.seconds.values()) / 60
    yield f"All of it took {minutes:.1f} minutes. Ask it: m2f2 chat IMAGE --model {explainer}\n"
