"""The dialogue benchmarks: where their questions lie, how they are asked, and how they count.

Sources of the counts stand beside them. The answers of VQAv2's and VizWiz's test splits are on
servers only, so these are evaluated on their validation splits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl_jax.evals import files
from internvl_jax.evals import question_files as read_from
from internvl_jax.evals.files import DatasetError
from internvl_jax.evals.question_files import Question

SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    metric: "vqa", "exact", "pope", "mme" or "choice", see `vqa.score`. counts: of questions, any
    of which is the protocol's. layout: the makers' files below the root, that `read` reads.
    prompt: what follows the question on a line of its own.
    """

    metric: str
    counts: tuple[int, ...]
    read: Callable[[Path], list[Question]]
    layout: str
    prompt: str = SHORT
    max_new_tokens: int = 128


BENCHMARKS = {
    "vqav2": Benchmark(
        "vqa", (214354,),  # visualqa.org/download.html, validation
        read_from.vqa("vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
                      "vqav2/v2_mscoco_val2014_annotations.json"),
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; "
        "coco/val2014/",
    ),
    "okvqa": Benchmark(
        "vqa", (5046,),  # arXiv 1906.00067, test (on COCO's val2014)
        read_from.vqa("okvqa/OpenEnded_mscoco_val2014_questions.json",
                      "okvqa/mscoco_val2014_annotations.json"),
        "okvqa/OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json; "
        "coco/val2014/",
    ),
    "textvqa": Benchmark(
        "vqa", (5000,), read_from.textvqa,  # textvqa.org/dataset, validation 0.5.1
        "textvqa/TextVQA_0.5.1_val.json, textvqa/train_images/",
    ),
    "vizwiz": Benchmark(
        "vqa", (4319,), read_from.vizwiz,  # vizwiz.org/tasks-and-datasets/vqa, validation
        "vizwiz/[Annotations/]val.json, vizwiz/val/", f"{UNANSWERABLE}\n{SHORT}",
    ),
    "gqa": Benchmark(
        "exact", (12578,), read_from.gqa,  # cs.stanford.edu/people/dorarad/gqa, test-dev balanced
        "gqa/[questions1.2/]testdev_balanced_questions.json, gqa/images/",
    ),
    "pope": Benchmark(
        # Random, popular and adversarial: 2910 + 3000 + 3000 when LLaVA-1.5 and the paper used it;
        # 9000 in the makers' files of today (github.com/AoiDragon/POPE).
        "pope", (8910, 9000), read_from.pope,
        "pope/coco_pope_{random,popular,adversarial}.json, coco/val2014/",
    ),
    "mme": Benchmark(
        "mme", (2114,), read_from.mme,  # arXiv 2306.13394, the ten perception tasks
        "mme/[MME_Benchmark_release_version/]<task>/",
    ),
    "mmbench": Benchmark(
        # huggingface.co/datasets/lmms-lab/MMBench_EN, dev: 1164 questions in all their orders.
        "choice", (4377,), read_from.mmbench, "mmbench/mmbench_dev_20230712.tsv", LETTER, 1024,
    ),
}  # fmt: skip


def read(name: str, root: Path, partial: bool = False, pictures: bool = True) -> list[Question]:
    """The questions of a benchmark: of `<name>/questions.jsonl` where it exists, else the makers'.

    pictures: check that they are there.

    Raises DatasetError: an unknown name, missing files, repeated ids, other counts.
    """
    if name not in BENCHMARKS:
        raise DatasetError(f"unknown data set {name!r}; there are {', '.join(BENCHMARKS)}")
    one = BENCHMARKS[name]
    layout = f"put {one.layout} below {root}, or {name}/questions.jsonl (docs/evaluation.md)"
    try:
        own = (root / name / "questions.jsonl").is_file()
        asked = read_from.own_lines(root / name) if own else one.read(root)
        _distinct(asked)
        if pictures:
            files.present([q.image for q in asked])
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}; {layout}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{name}: its files are not as they are published: {error!r}; {layout}"
        ) from error
    if (len(asked) not in one.counts and not partial) or not asked:
        wanted = " or ".join(map(str, one.counts))
        raise DatasetError(
            f"{name}: found {len(asked)} questions where the protocol has {wanted}; {layout}. "
            "The option partial=True evaluates what is there"
        )
    return asked


def _distinct(asked: list[Question]) -> None:
    seen, repeated = set(), []
    for question in asked:
        if question.id in seen:
            repeated.append(question.id)
        seen.add(question.id)
    if repeated:
        raise DatasetError(f"{len(repeated)} ids are repeated, the first {repeated[0]}")
