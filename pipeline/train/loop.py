"""What each training worker runs: its start, then the loop, each step with a checkpoint where due.

Ray's examples have `get_dataset_shard` and `train.report` in this place. A shard deals blocks out
as workers ask, and our steps are fixed by `stream/order.py`, whatever the size of the group; a
report keeps checkpoints in the records of one start of the job, and ours outlive it in the run
folder (docs/decisions.md).
"""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from typing import Any

import ray.train

from pipeline import log as logs
from pipeline.driver.mailbox import MOVE, STOP, RemoteLines
from pipeline.heartbeat import WORKER_SILENCE_S, beating, doing, now
from pipeline.plan.plan import Plan
from pipeline.train.guard.begin import is_guarded
from pipeline.train.parallel.garbage import Garbage
from pipeline.train.speed.bottleneck import Window, duration
from pipeline.train.speed.parts import part
from pipeline.train.step import NonFinite
from pipeline.train.worker import Job, Worker, uncompilable_somewhere

HOLD_S = 120.0  # a group that wrote a checkpoint to move waits so long to be taken away


def train_worker(job: Job) -> dict[str, Any] | None:
    """One worker of the group, from its start to its end. Rank 0 gives the outcome of the run,
    which Ray Train hands to the driver; None where the workers do not see one run folder.
    """
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    plan = Plan.model_validate_json(job["plan"]).for_workers(workers)
    logs.configure(
        f"[w{rank}]" if rank else "",
        logging.WARNING if rank else logging.INFO,
        RemoteLines(job["feeder"]),
    )
    with beating(WORKER_SILENCE_S) if rank == 0 else nullcontext(), doing("pretrain: starting"):
        if missing := uncompilable_somewhere(plan):
            return {"status": "no_compiler", "detail": missing}
        worker = Worker.start(job, plan, rank)
        if worker is None:
            return None
        with closing(worker.images), Garbage() as garbage:
            return _train(worker, garbage)


def _train(worker: Worker, garbage: Garbage) -> dict[str, Any] | None:
    """Steps until the last one, a request to end, or one that is not finite.

    A request (STOP, MOVE, or SAVE for a checkpoint alone) ends no step: it is taken up between two.
    All ranks take the same turns: what only rank 0 can know reaches the others by `train_step`
    (`result.stop`) and `worker.agreed`.
    """
    # On every other rank `rank_zero` is an `OtherRank`: the same calls, which do nothing.
    plan, clock, rank_zero = worker.plan, worker.clock, worker.rank_zero
    outcome: dict[str, Any] = {"status": "finished"}
    window = Window()
    step = worker.first_step
    if not worker.resumed and is_guarded(plan.config):
        rank_zero.save(step)  # the start may be the best
    if plan.evaluates_at(step):
        # after a resume too: what was under way died with the workers
        rank_zero.evaluate(step, worker.teacher())
    while step < plan.steps:
        worker.profile.begin(step + 1)
        now(f"pretrain: waiting for the images of step {step}")
        with clock.waiting(), part("data"):
            images = worker.images.next()
        window.add_images(images.batches)
        if step == 0:
            rank_zero.picture_crops(images.batches[0])

        compiles = ", which compiles the networks" if step == worker.first_step else ""
        left_s = clock.left_s()
        eta = f", eta {duration(left_s)}" if left_s is not None else ""
        what = f"pretrain: step {step} of {plan.steps}{compiles if plan.compile else ''}{eta}"
        now(what, left_s)
        try:
            result = worker.step(step, images, stop=bool(rank_zero.request()))
        except NonFinite as error:
            outcome = {"status": "non_finite", "step": step, "detail": error.what}
            rank_zero.non_finite(step, window.gathered(worker.device, plan.workers), clock)
            break
        garbage.after_step()
        worker.profile.end()
        clock.tick()
        window.scalars.append(result.scalars)
        step += 1  # from here on: steps done

        last = step == plan.steps
        evaluate_due = plan.evaluates_at(step)
        # every teacher that is evaluated from here on has a checkpoint: any can be the best
        save_due = evaluate_due or result.stop or step % plan.save_every == 0
        if save_due or step % plan.config.train.log_every == 0:
            # All ranks gather, one writes. Before the checkpoint: a resume then misses no line.
            rank_zero.log(step, window.gathered(worker.device, plan.workers), clock)
            window = Window()
        now(f"pretrain: after step {step} of {plan.steps}", left_s)
        if save_due:
            rank_zero.save(step)
        if evaluate_due:
            rank_zero.evaluate(step, worker.teacher())
        if result.stop and not last:
            # asked again: it may have been taken back, and before a move evaluations are waited for
            request = worker.agreed(rank_zero.confirmed(step))
            if request == STOP:
                outcome = {"status": "stopped", "step": step}
                break
            if request == MOVE:
                time.sleep(HOLD_S)  # the group is taken away meanwhile; if not, it goes on
    worker.profile.close()
    worker.memory.close()
    worker.images.close()  # before the last evaluation and checkpoint are waited for
    return rank_zero.finish(outcome, clock)
