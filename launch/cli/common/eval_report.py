"""Report of `densenet eval`: a model's accuracy on a split."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pipeline.config_fields import Interpolation
from pipeline.evaluation.counts import format_accuracy
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.scores import Scores
from pipeline.export.open import TrainedModel, open_model
from pipeline.formatting import number
from pipeline.tracking.stores import Stores


@dataclass(frozen=True)
class Options:
    """Options of `densenet eval`; None: the value in the model's card."""

    split: str
    crop: int | None
    resize: int | None
    interpolation: Interpolation | None
    tta: str | None
    labels: Path | None
    classes: Path | None
    out: Path | None
    batch_size: int


def eval_command(console: Console, model: str, root: Path, options: Options, stores: Stores, as_json: bool) -> None:
    """Prints the scores of a checkpoint, a run or a registered model, and writes the tables to `options.out`.

    Raises:
        UserError: The model or split does not exist, or the classes, sizes or labels do not match.
    """
    opened = open_model(model, stores=stores)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)
        evaluation = opened.evaluate(
            root,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **vars(options),
        )
    if as_json:
        print(json.dumps(asdict(evaluation), indent=2))
        return
    _print(console, opened, evaluation)
    if options.out is not None:
        console.print(f"tables in {options.out}", markup=False, soft_wrap=True)


def _print(console: Console, model: TrainedModel, evaluation: Evaluation) -> None:
    lines = [
        ("model", f"{model.model_uri} ({model.weights})"),
        ("data", f"{evaluation.total:,} images in {Path(evaluation.data).absolute()}"),
        ("transform", evaluation.transform),
    ]
    for name, scores in evaluation.scores.items():
        if isinstance(scores, Scores):
            accuracies, calibration_error = format_accuracy(scores), number(scores.calibration_error)
            text = f"{accuracies}, loss {number(scores.loss)}, calibration error {calibration_error}"
            lines.append((name, text))
        else:
            top1 = f"{scores.top1_correct}/{scores.total} = {100 * scores.top1_correct / max(1, scores.total):.2f} %"
            unlabeled = evaluation.total - scores.total
            lines.append((name, f"top-1 {top1} by {scores.file}, {unlabeled} images without label"))
    for name, text in lines:
        console.print(f"{name:10}{text}", markup=False, soft_wrap=True)
