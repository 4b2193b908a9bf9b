"""The main job: train the stages of configs/demo.py, evaluate, export, and show the result.

It only calls what users call: `train`, the evaluators, `convert`. Finished parts are kept in the
work directory and reused, so an interrupted job goes on where it stopped and a finished one is
repeated in seconds.

<workdir>/<stage>/        work directory of each stage (see `train.workdir`)
          evaluations/    figures and details of each evaluated checkpoint
          export/         InternVL-G in the official InternVL-14B layout
          metrics.json    every figure, flat
          report.html     the same to look at, in one file
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax import configuration, convert, loading
from internvl_jax.data import conversation
from internvl_jax.demo import report, targets
from internvl_jax.demo.record import Record, write_json
from internvl_jax.evals import evaluate, evaluator, features
from internvl_jax.evals.attention import attention_maps
from internvl_jax.models import InternVLConfig, create, from_dict
from internvl_jax.train import checkpoint, loop, pretrained
from internvl_jax.train import workdir as workdirs

CONFIG = "demo"
CONFIG_WORKDIR = "runs/demo"  # where the configs of the stages look for one another
MAX_EXPORT_DIFFERENCE = 1e-5
# May differ from the run that trained a stage without making it another stage. Where it starts
# from is compared by content, not by path.
_FREE = ("init_from", "log_every", "checkpoint", "evals", "mesh", "max_nonfinite")
_ATTENTION_IMAGES = 6


def run(
    workdir: str | Path = CONFIG_WORKDIR,
    configs: Mapping[str, Any] | None = None,
    evals: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Train, evaluate, export and report; returns what it writes to `metrics.json`.

    Args:
        workdir: everything is written below it; what is there already is used.
        configs: stage → ConfigDict, in order; without it those of configs/demo.py.
        evals: evaluator → options other than its defaults.

    Raises:
        WorkdirError: `workdir` holds stages of other configs, cannot be written, or is in use.
        RuntimeError: the exported weights do not give the same features.
    """
    workdir = Path(workdir)
    configs = relocated(workdir, shipped_configs() if configs is None else configs)
    loop.enable_compile_cache()
    with workdirs.opened(workdir):
        record = Record(workdir)
        evaluations = _train_and_evaluate(workdir, configs, evals or {}, record)
        export = _export(workdir, configs, record)
        metrics = _metrics(workdir, configs, evaluations)
        metrics |= {f"export.{name}": value for name, value in export.items()}
        record.save()
        metrics |= record.metrics()
        write_json(workdir / "metrics.json", metrics)
        details = {}
        for stage in configs:
            details |= evaluations[stage][1]
        curves = _curves(workdir, configs)
        report.write(workdir / "report.html", configs, metrics, details, curves, _purposes())
    print(targets.as_text(targets.rows(metrics)))
    print(f"\nall figures   {workdir / 'metrics.json'}")
    print(f"look at       {workdir / 'report.html'}")
    print(f"for PyTorch   {workdir / 'export'}")
    return metrics


def shipped_configs() -> dict[str, Any]:
    """The stages of configs/demo.py, in order."""
    stages = configuration.load_module(CONFIG).STAGES
    return {stage: configuration.load(f"{CONFIG}:{stage}") for stage in stages}


def _purposes() -> dict[str, str]:
    """What configs/demo.py says of each stage, in a line."""
    stages = configuration.load_module(CONFIG).STAGES
    return {stage: (build.__doc__ or "").partition("\n")[0] for stage, build in stages.items()}


def relocated(workdir: Path, configs: Mapping[str, Any]) -> dict[str, Any]:
    """The configs with the stages that they start from looked for in `workdir`."""
    moved = {}
    for stage, config in configs.items():
        config = config.copy_and_resolve_references()
        sources = []
        for source in config.init_from:
            path = Path(source["path"])
            if path.is_relative_to(CONFIG_WORKDIR):
                path = workdir / path.relative_to(CONFIG_WORKDIR)
            sources.append({**source, "path": str(path)})
        with config.unlocked(), config.ignore_type():
            config.init_from = tuple(sources)
        moved[stage] = config
    return moved


# ---- stages -----------------------------------------------------------------------------------


def _train_and_evaluate(
    workdir: Path, configs: Mapping[str, Any], evals: Mapping[str, Any], record: Record
) -> dict[str, tuple[dict, dict]]:
    """Each stage in turn; {stage: (figures, details)}, with those of untrained models besides.

    The figures of an untrained model are under "untrained.<stage>". Only what the report shows is
    kept as details: those of the last stage that has an evaluator.
    """
    results: dict[str, tuple[dict, dict]] = {}
    for number, (stage, config) in enumerate(configs.items()):
        _say(f"stage {number + 1} of {len(configs)}: {stage}, {config.steps} steps")
        _train(workdir / stage, stage, config, record)
        model_config = from_dict(config.model)
        names = evaluator.suited(model_config)
        if not names:
            results[stage] = {}, {}
            continue
        last = [name for name in names if _last_stage(name, configs) == stage]
        settings = _settings(config)
        settings["evals"] = {**settings["evals"], **evals}

        def trained(stage=stage, names=names, last=last, settings=settings):
            _say(f"evaluating {stage}")
            model = loading.load(workdir / stage)
            return _evaluate(model.config, model.params, names, last, settings)

        key = {"checkpoint": _identity(workdir / stage), "evals": settings["evals"]}
        results[stage] = record.evaluation(stage, {**key, "of": names, "kept": last}, trained)
        if not last:
            continue

        def untrained(model_config=model_config, last=last, settings=settings):
            _say("evaluating the same model untrained, for comparison")
            params = create(model_config, jax.random.key(settings["seed"]))
            return _evaluate(model_config, params, last, (), settings)

        key = {part: settings[part] for part in ("seed", "model", "data", "evals")}
        name = f"untrained.{stage}"
        results[name] = record.evaluation(name, {**key, "of": last}, untrained)
    return results


def _last_stage(name: str, configs: Mapping[str, Any]) -> str:
    """The last stage whose model an evaluator can judge: its figures are the final ones."""
    return [s for s, c in configs.items() if name in evaluator.suited(from_dict(c.model))][-1]


def _train(directory: Path, stage: str, config: Any, record: Record) -> None:
    """Train a stage, go on with it, or see that it is finished.

    Raises WorkdirError if the directory holds a stage of another config, or one that started from
    other weights than are there now: its figures would not be those of this job.
    """
    origins = {source["path"]: _identity(source["path"]) for source in config.init_from}
    names = {Path(path).name: identity for path, identity in origins.items()}
    steps = checkpoint.committed_steps(directory / "checkpoints")
    if steps:
        remedy = f"choose another --workdir, or move {directory} away to train it again"
        if record.values["origins"].get(stage, names) != names:
            raise workdirs.WorkdirError(
                f"{directory} started from other weights than are now in {', '.join(names)}; "
                f"{remedy}, with the stages after it"
            )
        # A damaged record is the train loop's business: it falls back to an older step.
        with contextlib.suppress(checkpoint.CheckpointCorrupt):
            saved = checkpoint.read_meta(directory / "checkpoints" / str(steps[-1]))
            changes = workdirs.differences(saved["config"], _settings(config))
            changes = {n: c for n, c in changes.items() if n.split(".")[0] not in _FREE}
            if changes:
                what = "; ".join(f"{n}: {old!r} → {new!r}" for n, (old, new) in changes.items())
                raise workdirs.WorkdirError(
                    f"{directory} was trained with another config ({what}); {remedy}"
                )
            if steps[-1] >= config.steps:
                return
    record.values["origins"][stage] = names
    record.save()
    with record.phase(stage):
        loop.train(config, directory)


def _settings(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))


def _identity(path: str | Path) -> str:
    """Changes with every array and with the step of the newest checkpoint of a run."""
    return checkpoint.read_meta(pretrained.find_step(path))["sha256"]


def _evaluate(
    model_config: Any, params: dict, names: Any, kept: Any, experiment: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of all `names`, details of those in `kept`."""
    figures, details = evaluate.evaluate_with(model_config, params, names, experiment)
    details = {name: details[name] for name in kept}
    if "retrieval" in details and model_config.num_queries:
        images = details["retrieval"]["images"][:_ATTENTION_IMAGES]
        maps = attention_maps(model_config, params, images, batch_size=len(images))
        details["attention"] = {"images": images, "maps": maps}
    return figures, details


# ---- export -----------------------------------------------------------------------------------


def _export(workdir: Path, configs: Mapping[str, Any], record: Record) -> dict[str, float]:
    """Write the last InternVL-G as an official checkpoint, read it back, compare features."""
    stages = [s for s, c in configs.items() if _has_middleware(from_dict(c.model))]
    if not stages:
        return {}
    target = workdir / "export"
    key = _identity(workdir / stages[-1])
    kept = record.values["export"]
    if kept.get("checkpoint") == key and target.is_dir():
        return {"max_difference": kept["max_difference"]}
    with record.phase("export"):
        _say(f"exporting {stages[-1]} to {target}")
        model = loading.load(workdir / stages[-1])
        if target.exists():  # of another checkpoint, or not yet compared
            shutil.rmtree(target)
        convert.export(model.params, model.config, target)
        difference = _difference(model, loading.load(target))
    if not difference <= MAX_EXPORT_DIFFERENCE:
        raise RuntimeError(
            f"the weights exported to {target} give other features than the trained model: they "
            f"differ by up to {difference:.3g}, {MAX_EXPORT_DIFFERENCE:g} is allowed"
        )
    record.values["export"] = {"checkpoint": key, "max_difference": difference}
    record.save()
    return {"max_difference": difference}


def _has_middleware(model_config: Any) -> bool:
    return isinstance(model_config, InternVLConfig) and model_config.num_queries > 0


def _difference(first: loading.Model, second: loading.Model, count: int = 32) -> float:
    """Largest difference between unit features of two models on noise and on words."""
    size = first.config.vit.image_size
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    prompts = [conversation.contrastive_text(p) for p in conversation.GENERATION_PROMPTS.values()]
    ids = first.tokenizer.encode_batch(prompts, 32)

    def all_features(model):
        for mode in ("c", "g"):
            yield features.image_features(model.config, model.params, images, mode, count)
        yield features.text_features(model.config, model.params, ids, len(ids))

    pairs = zip(all_features(first), all_features(second), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


# ---- figures ----------------------------------------------------------------------------------


def _metrics(
    workdir: Path, configs: Mapping[str, Any], evaluations: Mapping[str, tuple[dict, dict]]
) -> dict[str, float]:
    """All figures under their names in metrics.json.

    A figure without prefix is that of the last stage that has it; what earlier stages reached
    stands under "after_<stage>.", what the models reach before training under "untrained.".
    """
    metrics: dict[str, float] = {}
    for name, (figures, _) in evaluations.items():
        for figure, value in figures.items():
            final = _last_stage(figure.split(".")[0], configs)
            if name.startswith("untrained."):
                metrics[f"untrained.{figure}"] = value
            else:
                metrics[figure if name == final else f"after_{name}.{figure}"] = value
    metrics |= targets.derived(metrics)
    for stage, rows in _curves(workdir, configs).items():
        for term in report.loss_terms(rows):
            final = [row[term] for row in rows if term in row][-1]
            metrics[f"final.{stage}.{term}"] = final
    # Final figures first; insertion order decides what comes next.
    return dict(sorted(metrics.items(), key=lambda item: _group(item[0])))


def _group(name: str) -> int:
    starts = ("untrained.", "after_", "final.")
    return next((i for i, start in enumerate(starts, 1) if name.startswith(start)), 0)


def _curves(workdir: Path, configs: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The rows that training wrote, {stage: [{"step": 10, "loss": 2.3, …}, …]}."""
    return {stage: list(_rows(workdir / stage / "metrics.jsonl")) for stage in configs}


def _rows(file: Path) -> Iterator[dict[str, float]]:
    """Rows in order of steps; of steps done twice, after a kill, the later row."""
    found: dict[int, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut off
            row = json.loads(line)
            found.setdefault(row["step"], {}).update(row)
    yield from (found[step] for step in sorted(found))


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)
