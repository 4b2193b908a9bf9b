"""The train loop of every stage: `train(config, workdir)`, to be read from top to bottom.

What a run starts from, in this order: its own work directory; then `config.init_from`, parameter
by parameter; then random initialisation. So the same command starts a run and continues it.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from internvl_jax import objectives, rules, sharding
from internvl_jax.data import pipelines
from internvl_jax.models import config as models
from internvl_jax.models import init
from internvl_jax.train import (
    checkpoint,
    flops,
    goodput,
    metrics,
    optimizer,
    preemption,
    pretrained,
    processes,
    workdir,
)
from internvl_jax.train import state as states
from internvl_jax.train.batches import batches_of
from internvl_jax.train.step import make_train_step


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


def enable_compile_cache() -> None:
    """Keep compiled programs between processes.

    In JAX_COMPILATION_CACHE_DIR if that is set, else in the user's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "internvl_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def train(config: Any, directory: str | Path) -> dict[str, float]:
    """Run or resume one experiment; returns the last metrics, evaluations included.

    config: a ConfigDict as `configs/common.py` defines it. directory: the work directory.

    Of several processes (`processes.joined`) each calls this with the same config and directory.

    Raises before anything compiles: MeshError, ModelConfigError, RuleError, WorkdirError (not
    writable, in use, or of another experiment), CheckpointError, ProcessError (processes that
    differ). Later: NonFiniteError; SystemExit 143 or 130 after SIGTERM or Ctrl-C on any process,
    with the current step saved.
    """
    settings = json.loads(json.dumps(config.to_dict()))
    enable_compile_cache()

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(preemption.Watch())
        if jax.process_count() > 1:
            processes.check_same({"config": settings, "code": processes.code_version()})

        # What cannot work is refused here, by all processes if by one, before anything compiles.
        with processes.together():
            # --- the mesh and the model's shapes -------------------------------------------------
            mesh = sharding.make_mesh(**config.mesh)
            model_config = models.from_dict(config.model)
            sharding.check_divisible(model_config, mesh, config.batch_size, config.chunks)
            evaluators = _evaluators(config)
            stack.enter_context(jax.set_mesh(mesh))
            path = stack.enter_context(workdir.opened(directory))

            # --- data, and whether the model knows all of its tokens -----------------------------
            shapes = states.on_mesh(init.abstract(model_config), mesh)
            pipeline = _pipeline(config, model_config, shapes, mesh)

            # --- optimizer and the shapes of the whole state -------------------------------------
            learned, _ = rules.partition(shapes, config.trainable)
            tx, learning_rate = optimizer.make_optimizer(
                config.optimizer,
                learned,
                steps=config.steps,
                all_params=shapes,
                cross_every=_cross_every(model_config),
            )
            make_state = functools.partial(states.create, trainable=config.trainable, tx=tx)
            abstract = states.on_mesh(jax.eval_shape(make_state, shapes), mesh)
        processes.check_same({"data": pipeline.fingerprint})
        processes.check_shared(path)

        # --- own work directory, else init_from, else scratch ------------------------------------
        checkpoints = checkpoint.Checkpoints(path / "checkpoints", keep=config.checkpoint.keep)
        stack.callback(checkpoints.close)
        for name in checkpoints.removed:
            processes.say(f"removed {name}, which an interrupted save left behind")
        with processes.together(workdir.WorkdirError):
            if jax.process_index() == 0:
                resuming = bool(checkpoints.steps())
                workdir.claim(
                    path,
                    settings,
                    pipeline.fingerprint,
                    resuming=resuming,
                    data_content=pipeline.content,
                )
        restored = checkpoints.restore(abstract)
        if restored is not None:
            state = restored[0]
            processes.say(f"continuing {path} at step {int(state.step)}")
        else:
            params = _initial_params(config, model_config, shapes)
            state = jax.jit(make_state)(params)
            del params
        for group in optimizer.describe_groups(state.trainable, config.optimizer.learning_rate):
            processes.say(f"learning rate {group}")
        processes.say(f"frozen: {sum(x.size for x in jax.tree.leaves(state.frozen)):,} parameters")

        # --- the step, evaluations, writers ------------------------------------------------------
        objective = objectives.OBJECTIVES[config.objective](**config.objective_options)
        train_step = make_train_step(
            objective,
            functools.partial(init.bind, model_config),
            tx,
            seed=config.seed,
            chunks=config.chunks,
            held_towers=config.held_towers,
            learning_rate=learning_rate,
        )
        start = int(state.step)
        log = metrics.MetricsLog(path, start=start, steps=config.steps)
        stack.callback(log.close)
        speed, work = metrics.Speed(), _model_flops(config, state, pipeline)
        progress = goodput.Goodput(path, start)
        spikes = metrics.SpikeDetector()
        last: dict[str, float] = {}

        def report(
            step: int, device_metrics: Mapping[str, jax.Array], images: int, waited: float
        ) -> None:
            """Fetch, check and write the metrics of the update that made `step`."""
            values = {n: float(x) for n, x in jax.device_get(dict(device_metrics)).items()}
            held = values.get("images", images), values.get("tokens", 0.0)  # without padding
            speed.count(held[0], waited, held[1], flops=work(*held))
            progress.count(waited)
            log.advance(step, values["loss"])
            spike = spikes.update(values["loss"])
            if spike:
                log.say(f"loss spike at step {step}: {spike}; {_batch_of(step, pipeline)}")
            if values["nonfinite_in_a_row"]:
                log.say(
                    f"step {step}: loss {values['loss']:g}, gradient norm "
                    f"{values['grad_norm']:g}; update skipped; {_batch_of(step, pipeline)}"
                )
            if step % config.log_every == 0 or step == config.steps:
                values.update(speed.report(), goodput=progress.share())
                if skipped := sum(batches.skipped.values()):
                    values["records_skipped"] = float(skipped)
                log.write(step, values)
            last.update(values)
            if values["nonfinite_in_a_row"] >= config.max_nonfinite:
                _tolerant(checkpoints.wait)
                raise NonFiniteError(_nonfinite_report(step, config, checkpoints, pipeline))

        def evaluate(step: int, names: list[str]) -> None:
            for name in names:
                results = evaluators[name].run(model_config, state.params)
                figures = {f"{name}.{key}": float(value) for key, value in results}
                log.write(step, figures)
                last.update(figures)

        def save(must: bool) -> None:
            """Start saving the state; where it `must` succeed, wait, and try twice."""
            _tolerant(checkpoints.wait)
            begin = functools.partial(
                checkpoints.save, state, config=settings, data_fingerprint=pipeline.fingerprint
            )
            begun = _tolerant(begin)
            if must and not (begun and _tolerant(checkpoints.wait)):
                begin()
                checkpoints.wait()

        # --- the loop ----------------------------------------------------------------------------
        # `state.step` counts updates attempted. The batch of update i is batch i of the pipeline,
        # whatever came before, so nothing but the state need be saved. The metrics of an update are
        # fetched after the next is dispatched: the device never waits for the host.
        batches = stack.enter_context(contextlib.closing(pipeline.iterate(start)))
        signalled = processes.Agreed(mesh)
        pending = None
        for step in range(start + 1, config.steps + 1):
            before = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - before
            batch = to_devices(batch, mesh)
            state, current = train_step(state, batch)
            if pending is not None:
                report(*pending)
            pending = (step, current, metrics.images_in(batch), waited)

            signal = signalled(watch.number)  # on any process
            leaving = signal != 0
            due = [n for n, e in evaluators.items() if step % e.every == 0 or step == config.steps]
            saving = step % config.checkpoint.every == 0 or step == config.steps or leaving
            if saving or due:
                report(*pending)
                pending = None
            aside = time.monotonic()
            if saving:
                save(must=leaving or step == config.steps)
                progress.save(step)
            if leaving:
                processes.say(
                    f"saved step {step} of {config.steps} in {path}; the same command with the "
                    "same --workdir continues from there"
                )
                raise SystemExit(preemption.EXIT_CODES[signal])
            evaluate(step, due)
            _tolerant(checkpoints.poll)
            aside = time.monotonic() - aside
            speed.exclude(aside)
            progress.exclude(aside)
        if start >= config.steps:
            processes.say(f"{path} has its {config.steps} steps already; nothing to train")
            evaluate(start, list(evaluators))
    return last


def _pipeline(
    config: Any, model_config: Any, shapes: dict, mesh: jax.sharding.Mesh
) -> pipelines.Pipeline:
    """The data of `config.data`: the rows of each batch that this process's devices hold."""
    rows = None if jax.process_count() == 1 else sharding.local_rows(mesh, config.batch_size)
    pipeline, tokenizer = batches_of(config, model_config, rows)
    for path, leaf in rules.flatten(shapes).items():
        # A token beyond the table would be looked up as NaN.
        if path.endswith("embed/embedding") and leaf.shape[0] < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, but {path} has "
                f"{leaf.shape[0]} rows; set model.vocab_size, or data.tokenizer to the model's own"
            )
    return pipeline


def to_devices(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch over the mesh, from this process's rows of it (`sharding.local_rows`)."""
    place = sharding.batch_sharding(mesh)
    return {n: jax.make_array_from_process_local_data(place, x) for n, x in batch.items()}


def _initial_params(config: Any, model_config: Any, shapes: dict) -> dict:
    """Parameters of a new run: `init_from` where it has them, the rest random."""
    key = jax.random.key(config.seed)
    if not config.init_from:
        return init.create(model_config, key)
    loaded = pretrained.load_params([dict(source) for source in config.init_from], shapes)
    for line in str(loaded).splitlines():
        processes.say(line)
    if not loaded.fresh:
        return loaded.params

    # Only the missing ones are computed: two whole models never lie in memory together.
    def missing(key):
        flat = rules.flatten(init.create(model_config, key))
        return rules.unflatten({path: flat[path] for path in loaded.fresh})

    return rules.merge(loaded.params, jax.jit(missing)(key))


def _cross_every(model_config: Any) -> int:
    """Every how many layers the language tower cross-attends (for its layer decay)."""
    inner = getattr(model_config, "middleware", None) or model_config
    return getattr(inner, "cross_every", 1)


def _evaluators(config: Any) -> dict[str, Any]:
    if not config.evals:
        return {}
    from internvl_jax.evals import evaluator

    return evaluator.build(config.evals, config)


def _model_flops(config: Any, state: Any, pipeline: Any) -> Callable[[float, float], float]:
    """Model FLOPs of a step by its (images, tokens), where a utilisation can be reported at all."""
    if jax.devices()[0].device_kind not in metrics.PEAK_FLOPS:
        return lambda images, tokens: 0.0
    batch = to_devices(pipeline.batch(0), jax.sharding.get_mesh())
    if config.objective == "instruct":
        per_square, per_token = flops.parts_of_step(config, state, batch)
        return lambda images, tokens: per_square * images + per_token * tokens
    whole = flops.of_step(config, state, batch)
    return lambda images, tokens: whole


def _batch_of(step: int, pipeline: Any) -> str:
    return f"its data: batch {step - 1} of the pipeline with fingerprint {pipeline.fingerprint}"


def _nonfinite_report(step: int, config: Any, checkpoints: Any, pipeline: Any) -> str:
    saved = ", ".join(map(str, checkpoints.steps())) or "none"
    first = step - config.max_nonfinite + 1
    return (
        f"the loss or gradient was not finite in {config.max_nonfinite} updates in a row (steps "
        f"{first} to {step}); all were skipped, and the parameters are those of step {first - 1}. "
        f"Saved steps: {saved}. To look at it: {_batch_of(first, pipeline)}; a lower learning "
        "rate, a longer warm-up or a smaller optimizer.clip_norm often helps"
    )


def _tolerant(action: Callable[[], Any]) -> bool:
    """Do something about a checkpoint that may fail; a failure is reported and gives False."""
    try:
        action()
    except checkpoint.CheckpointError as error:
        processes.say(f"warning: {error}; the next save tries again")
        return False
    return True
