"""Records of trainings that never ran."""

from contralto.align.monitoring.findings import Finding
from contralto.align.monitoring.record import Point, Record
from contralto.common.versions import versions


def full(count=12, **about_more):
    """A record of everything."""
    chosen, rejected = [-0.5 * i for i in range(count)], [-1.0 - i for i in range(count)]
    half = [change / 2 for change in chosen]
    first = Point(0, 0.0, [0.0] * count, [0.0] * count, 0.0, 20.0)
    said = [
        {"name": f"<r{i}>", "chosen_tokens": 5, "rejected_tokens": 6, "prompt": "p", "chosen": "<b>", "rejected": ""}
        for i in range(count)
    ]
    about = {"model": "tiny", "parameters": 2000, "trained": 100, "adapter": True, "device": "cpu", "processes": 1}
    about |= {"datasets": {"train_dataset": 40, "eval_dataset": None}, "losses": ["apo_zero"], "beta": 0.1, "batch": 8}
    about |= {
        "learning_rate": 1e-4,
        "settings": {"seed": 3},
        "versions": versions(),
        "seconds": 61.2,
        "steps": 16,
    } | about_more
    return Record(
        "k",
        "eval_dataset",
        said,
        [-9.0] * count,
        [-9.0] * count,
        [float(i) for i in range(count - 1)] + [None],
        [first, Point(8, 0.5, half, rejected, 0.02, 21.0), Point(16, 1.0, chosen, rejected, 0.05, 22.0)],
        [Finding("warning", "Found <this>.", "Do that.", ("a", "b"), 3)],
        [{"step": 8, "kind": "displacement", "text": "chosen texts lose likelihood"}],
        about,
        [
            {"step": 8, "loss": 0.6, "grad_norm": 1.0, "rewards/accuracies": 0.7},
            {"step": 8, "eval_loss": 0.65},
            {"step": 16, "loss": 0.5},
        ],
    )
