"""What the main job must reach, and its figures beside that: for the terminal and the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from internvl_jax.data.text import LANGUAGES


@dataclass(frozen=True)
class Figure:
    """One line of the table of results.

    name: in metrics.json; "*" stands for a language. target: a bound for all columns, or for single
    languages and, under "", for the others; None for a figure that is only reported.
    percent: how values are printed. at_most: the bound is an upper one.
    """

    name: str
    title: str
    target: Mapping[str, float] = field(default_factory=dict)
    percent: bool = True
    at_most: bool = False

    def bound(self, column: str) -> float | None:
        return self.target.get(column, self.target.get(""))

    def format(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.percent:
            return f"{100 * value:.1f} %"
        if abs(value) >= 100:
            return f"{value:.0f}"
        return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.2g}"

    @property
    def wanted(self) -> str:
        """The target in words."""
        sign = "≤" if self.at_most else "≥"
        parts = []
        for column, bound in self.target.items():
            where = f"{column} " if column else ("others " if len(self.target) > 1 else "")
            number = f"{100 * bound:g} %" if self.percent else f"{bound:g}"
            parts.append(f"{where}{sign} {number}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """A figure with its values by column: languages, or "" where there is one value."""

    figure: Figure
    values: Mapping[str, float]
    untrained: Mapping[str, float]

    @property
    def missed(self) -> list[str]:
        """Columns that fall short."""
        figure, found = self.figure, []
        for column, value in self.values.items():
            bound = figure.bound(column)
            if bound is None:
                continue
            # Written so that a value that is not a number falls short.
            if not (value <= bound if figure.at_most else value >= bound):
                found.append(column)
        return found

    @property
    def verdict(self) -> str:
        """The word reached, or missed and the columns if not all; empty without a target."""
        if not self.figure.target:
            return ""
        if not self.missed:
            return "reached"
        everywhere = len(self.missed) == len(self.values)
        return "missed" if everywhere else f"missed {' '.join(self.missed)}"


def _recall(mode: str, way: str) -> Figure:
    words = {"i2t": "image → text", "t2i": "text → image"}[way]
    return Figure(
        f"retrieval.{mode}.*.{way}_r1",
        f"Retrieval, InternVL-{mode.upper()}, {words}, R@1",
        {"": 0.55},
    )


FIGURES = (
    Figure(
        "zero_shot.scenes.*",
        "Zero-shot, 48 colour–shape classes, held-out images",
        {"en": 0.60, "": 0.55},
    ),
    Figure("zero_shot.unseen_pairs.*", "Zero-shot, pairs never seen in training", {"": 0.20}),
    Figure("zero_shot.unseen_color", "… their colour right", {"": 0.85}),
    Figure("zero_shot.unseen_shape", "… their shape right", {"": 0.50}),
    Figure("zero_shot.digits.*", "Zero-shot, handwritten digits", {"": 0.90}),
    _recall("c", "i2t"),
    _recall("c", "t2i"),
    _recall("g", "i2t"),
    _recall("g", "t2i"),
    Figure("retrieval.g_minus_c", "… mean R@1 of InternVL-G minus InternVL-C", {"": 0.0}),
    Figure("relation.g.*.group", "Left/right and above/below told apart (group score)"),
    Figure("caption.color", "Captions: colour of an object right", {"": 0.70}),
    Figure("caption.shape", "Captions: shape of an object right", {"": 0.70}),
    Figure("caption.exact.*", "Captions: word for word one of the references"),
    Figure("caption.cider.*", "Captions: CIDEr", percent=False),
    Figure("chat.accuracy", "Chat: short answers right", {"": 0.75}),
    Figure("chat.majority_baseline", "… by always giving the most frequent answer"),
    Figure("chat.above_baseline", "… points above that baseline", {"": 0.20}),
    Figure("chat.accuracy.*", "Chat: short answers right, by language"),
    Figure(
        "export.max_difference",
        "Largest difference of a feature after export and reload",
        {"": 1e-5},
        percent=False,
        at_most=True,
    ),
    Figure("peak_rss_gib", "Peak memory, GiB", {"": 4.0}, percent=False, at_most=True),
    Figure(
        "seconds.total",
        "Seconds for all phases (without installation)",
        {"": 720.0},
        percent=False,
        at_most=True,
    ),
)


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """Figures that follow from others: means over languages and directions, and differences."""
    found = {}
    for mode in ("c", "g"):
        values = [
            metrics[name]
            for language in LANGUAGES
            for way in ("i2t", "t2i")
            if (name := f"retrieval.{mode}.{language}.{way}_r1") in metrics
        ]
        if values:
            found[f"retrieval.{mode}.mean_r1"] = sum(values) / len(values)
    if len(found) == 2:
        found["retrieval.g_minus_c"] = found["retrieval.g.mean_r1"] - found["retrieval.c.mean_r1"]
    if "chat.accuracy" in metrics:
        found["chat.above_baseline"] = metrics["chat.accuracy"] - metrics["chat.majority_baseline"]
    return found


def rows(metrics: Mapping[str, float]) -> list[Row]:
    """The table of results: every figure that the run has."""
    table = []
    for figure in FIGURES:
        columns = LANGUAGES if "*" in figure.name else ("",)
        names = {column: figure.name.replace("*", column) for column in columns}
        values = {c: metrics[name] for c, name in names.items() if name in metrics}
        if values:
            before = {c: metrics.get(f"untrained.{name}") for c, name in names.items()}
            table.append(Row(figure, values, {c: v for c, v in before.items() if v is not None}))
    return table


def as_text(table: list[Row]) -> str:
    """The table in plain columns; languages side by side, the best untrained value, the target."""
    lines = [("", *LANGUAGES, "untrained", "target", "")]
    for row in table:
        figure = row.figure
        if "" in row.values:
            cells = [figure.format(row.values[""]), "", "", ""]
        else:
            cells = [figure.format(row.values.get(language)) for language in LANGUAGES]
        before = figure.format(max(row.untrained.values())) if row.untrained else ""
        lines.append((figure.title, *cells, before, figure.wanted, row.verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    # Titles and words to the left, numbers to the right.
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
