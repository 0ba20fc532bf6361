"""The parts of the loop that `train()` repeats, and the state between them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpo_fast import report
from bpo_fast.checkpoint import TrainerState, load_checkpoint, read_state, save_checkpoint, save_moments
from bpo_fast.collect import Collector, divergence, with_reference
from bpo_fast.engine import SamplingParams
from bpo_fast.evaluate import EvalRow, as_metrics, judge_greedy, prompt_tokens, summarise
from bpo_fast.flops import StepFlop
from bpo_fast.gradients import step_gradients, sum_over_ranks
from bpo_fast.machine import peak_memory_gib, reset_peak
from bpo_fast.memory import token_budget
from bpo_fast.metrics import Metrics, Unlogged, read_metrics
from bpo_fast.optim import learning_rate
from bpo_fast.pairs import PairCounts, PhasePairs, read_pairs, write_pairs
from bpo_fast.plan import Phase, deal
from bpo_fast.progress import Progress
from bpo_fast.ranks import POLL_S, Ranks
from bpo_fast.run import Run
from bpo_fast.run_folder import PHASE_STAGES, pairs_words
from bpo_fast.sampler_reference import with_sampler_reference
from bpo_fast.setup import Parts
from bpo_fast.types import Pair


class Loop:
    """What train() repeats; its state is the step reached, in `num_steps`.

    Args:
        parts: models, data, plan.
        run: the run folder; a resumed one is put back to its newest checkpoint here.
        progress: where progress is shown.
        ranks: that share the work; rank 0 writes.
    """

    def __init__(self, parts: Parts, run: Run, progress: Progress, ranks: Ranks | None = None):
        self._parts, self._run, self._progress, self._ranks = parts, run, progress, ranks or Ranks()
        self._config, self._policy, self._work = parts.config, parts.policy, parts.work
        self._budget = token_budget(parts.config, parts.policy)
        self._flop = StepFlop.of(parts.policy)
        self.num_steps = 0
        self._phase = self._evaluated_step = -1
        self._num_ended_phases = 0
        self._num_bad_steps = self._num_tokens = 0
        num_lines = 0
        if run.checkpoint is not None:
            state = read_state(run.checkpoint)
            if not state.work:
                progress.print("begun by an older version: its prompts are not compared with those of now")
            elif state.work != self._work.digest:
                raise ValueError(f"data: other prompts or pairs than when {run.path} began")
            parts.reference.ema = load_checkpoint(run.checkpoint, parts.policy, parts.optimizer)
            self.num_steps, self._phase, num_lines = state.step, state.phase, state.num_metric_lines
            self._num_ended_phases, self._evaluated_step = state.num_ended_phases, state.evaluated_step
            self._num_bad_steps, self._num_tokens = state.num_bad_steps, state.num_tokens
            run.seconds = dict(state.seconds)
            progress.print(f"resuming at step {state.step} of {self._work.plan.num_steps}")
        self._policy.version = self.num_steps
        self._ranks.on_save(self._save_moments)
        keep_lines = num_lines if run.resume else None
        is_main = self._ranks.is_main
        self._metrics = Metrics(run.path, self._config.run.report_to, keep_lines=keep_lines) if is_main else Unlogged()
        self._saved_step = self.num_steps if run.checkpoint else -1
        self._memory: dict[str, float] = {}
        self._refreshed: dict[str, float] = {}
        self._peak_gib = 0.0
        self._seconds_before_phase = dict(run.seconds)
        if parts.annotator is not None:
            self._collector = Collector(self._config, parts.engine, parts.annotator, run, progress, self._ranks)

    def print_memory(self) -> None:
        """Prints the memory ledger before the first step; its parts stand in the line of every phase."""
        ledger = self._parts.ledger()
        self._progress.print(ledger.words())
        self._memory = ledger.metrics()

    def remaining_phases(self) -> list[Phase]:
        """Phases that have not been ended."""
        return list(self._work.plan.phases[self._num_ended_phases :])

    def collect(self, phase: Phase) -> PhasePairs:
        """The pairs of a phase with reference log-probs: from disk if they are there, else sampled now."""
        self._seconds_before_phase = dict(self._run.seconds)
        self._peak_gib = self._run_peak_gib()
        reset_peak()
        self._ranks.check_same(self._policy.parameters())
        with self._run.critical():
            # also where a resumed run goes on with a phase: its sampler has the weights that it was opened on
            self._refreshed = self._parts.engine.refresh(self.num_steps)
            if phase.index > self._phase:
                self._parts.reference.refresh(phase.index)
                self._phase = phase.index
        path = self._run.pairs_path(phase.index)
        # the initial policy is the current one before the first step only: it samples for all phases then
        ahead = self._config.method.sampler == "initial" and self._work.replayed is None
        if ahead and self.num_steps and not path.exists():
            raise ValueError(f"{path}: missing; the initial policy, which samples it, has been trained since")
        for p in self._work.plan.phases if ahead and not self.num_steps else (phase,):
            if not self._run.pairs_path(p.index).exists():
                new = self._collect_new(p)
                nothing_scored = new.counts.unscored and not (new.counts.tied or new.counts.identical)
                if not new.pairs and (p.num_steps > 1 or nothing_scored or self._is_last_chance(p)):
                    self._stop_without_pairs(new)
                self._write_pairs(self._run.pairs_path(p.index), new)
            self._ranks.wait()  # for rank 0 to have written them, before anyone reads them
        found = read_pairs(path)
        if not found.scored:
            found = self._score_reference(phase, found)
            self._write_pairs(path, found)
        return found

    def remaining_steps(self, phase: Phase, found: PhasePairs) -> Iterator[tuple[int, list[Pair]]]:
        """Yields (step, its pairs) for the steps of the phase not done yet."""
        dealt = deal(found.pairs, phase.num_steps)
        with self._progress.task(f"phase {phase.index + 1}: training", phase.num_steps) as task:
            task.advance(self.num_steps - phase.start)
            for step in range(self.num_steps, phase.stop):
                yield step, dealt[step - phase.start]
                task.advance(note=self._note)

    def step(self, step: int, pairs: Sequence[Pair]) -> None:
        """One optimizer step of every member on the same pairs."""
        every = self._config.eval.eval_steps
        if every and step and step % every == 0 and self._evaluated_step != step:
            self.evaluate("step")
        seconds_before = self._run.seconds.get("train", 0.0)
        mine = self._ranks.share(pairs, self._policy.pair_tokens).mine
        with self._run.critical():
            with self._run.timed("train"):
                sums = self._gradients(step, mine, len(pairs)) if pairs else {}
                norm, finite = self._parts.optimizer.step(step, sums["loss"]) if pairs else (0.0, True)
                norm, finite = float(norm), bool(finite)
                self._parts.optimizer.release_gradients()
            self.num_steps = step + 1
            self._policy.version = self.num_steps
            self._num_bad_steps = 0 if finite else self._num_bad_steps + 1
            self._num_tokens += sums.pop("tokens", 0)
            values = {name: float(value) for name, value in sums.items()}
            values |= {"learning_rate": learning_rate(self._config.optim, step, self._work.plan.num_steps)}
            values |= {"grad_norm": norm, "num_tokens": self._num_tokens, "pairs/step": len(pairs)}
            values |= {"phase": self._phase, "policy_version": self.num_steps, "bad_step": int(not finite)}
            values |= self._flop.rates(mine, self._run.seconds["train"] - seconds_before)
            self._metrics.log("step", self.num_steps, values)
            self._note = f"loss {values['loss']:.4f}" if "loss" in values else "no pairs"
            if self._num_bad_steps >= self._config.optim.max_bad_steps:
                self._stop_on_bad_steps(pairs)
            if self._config.run.save_steps and self.num_steps % self._config.run.save_steps == 0:
                self.save()

    def end_phase(self, phase: Phase, found: PhasePairs) -> None:
        """Logs the phase and, unless checkpoints come by steps, saves one; at most ten in a run of many phases."""
        seconds = {k: v - self._seconds_before_phase.get(k, 0.0) for k, v in self._run.seconds.items()}
        num_tokens = found.metrics.get("completions/num_tokens", 0.0)
        values: dict[str, float] = {"phase": phase.index, "policy_version": found.policy_version}
        values |= {f"pairs/{k}": v for k, v in vars(found.counts).items()}
        values |= self._refreshed | found.metrics
        values |= {f"timing/{stage}_s": seconds.get(stage, 0.0) for stage in PHASE_STAGES}
        if self._parts.annotator is not None:
            values["timing/annotate_overlapped_s"] = self._collector.overlapped_s
        values |= {"perf/tokens_per_s": num_tokens / max(1e-9, seconds.get("rollout", 0.0))}
        values |= {"perf/peak_memory_gib": peak_memory_gib()} | self._memory
        if phase.num_steps > 1 or phase.index == 0:
            self._progress.print(f"phase {phase.index + 1}: {pairs_words(vars(found.counts))}")
        due = self.num_steps - max(0, self._saved_step) >= self._work.plan.num_steps / 10
        with self._run.critical():
            self._metrics.log("phase", self.num_steps, values)
            self._num_ended_phases = phase.index + 1
            if self.num_steps == self._work.plan.num_steps or (due and not self._config.run.save_steps):
                self.save()

    def evaluate(self, when: str) -> None:
        """Judges greedy answers to the held-out prompts and logs the result; rows already on disk are taken as they
        are."""
        parts, config = self._parts, self._config
        if not self._work.held_out or (when == "before" and self._evaluated_step >= 0):
            return
        rows = self._run.read_eval()
        mine = [r for r in rows if r["when"] == when and r["step"] == self.num_steps]
        self._parts.engine.refresh(self.num_steps)
        seconds_before = self._run.seconds.get("eval", 0.0)
        share = self._ranks.share(self._work.held_out, prompt_tokens)
        num, done = len(share.mine), len(share.mine) if mine else 0
        with self._run.timed("eval"), self._progress.task(f"evaluation {when}", num, done=done) as task:
            assert config.sampling.max_new_tokens, "resolve() has set it"
            if not mine:  # and so for all ranks: rank 0 writes them once it has those of all
                mine = judge_greedy(
                    parts.engine,
                    share,
                    parts.judges,
                    max_new_tokens=config.sampling.max_new_tokens,
                    stop=config.sampling.stop or (),
                    policy_version=self.num_steps,
                    when=when,
                    task=task,
                )
                if self._ranks.is_main:
                    self._run.write_eval(rows + mine)
            if not self._ranks.is_main:
                self._evaluated_step = self.num_steps
                return
            self._kl = self._held_out_kl() if self.num_steps else 0.0
            summary = self._summarise(mine) | {"kl": self._kl}
        seconds = self._run.seconds["eval"] - seconds_before
        with self._run.critical():
            self._metrics.log("eval", self.num_steps, as_metrics(when, summary) | {"timing/eval_s": seconds})
            self._evaluated_step = self.num_steps

    def save(self) -> None:
        """Writes a checkpoint of the step reached, unless it is there."""
        if self._saved_step == self.num_steps or not self._ranks.is_main:
            return
        self._policy.put_back_()
        state = TrainerState(
            step=self.num_steps,
            phase=self._phase,
            num_ended_phases=self._num_ended_phases,
            evaluated_step=self._evaluated_step,
            num_metric_lines=self._metrics.num_lines,
            num_bad_steps=self._num_bad_steps,
            num_tokens=self._num_tokens,
            seconds=self._run.seconds,
            work=self._work.digest,
        )
        save_checkpoint(
            self._run.path,
            state,
            self._policy,
            self._parts.optimizer,
            ema=self._parts.reference.ema,
            keep=self._config.run.save_total_limit,
            ranks=self._ranks,
        )
        self._saved_step = self.num_steps

    def finish(self) -> dict[str, Any]:
        """Writes summary.json and report.html; returns the summary, on rank 0."""
        if not self._ranks.is_main:
            return {}
        config, rows = self._config, self._run.read_eval()
        counts = PairCounts()
        for phase in self._work.plan.phases:
            counts += read_pairs(self._run.pairs_path(phase.index)).counts
        seconds = {**self._run.seconds, "total": sum(self._run.seconds.values())}
        judges = [j.name for j in self._parts.judges]
        judge = judges[0] if judges else None
        first, last = ([r for r in rows if r["when"] == when] for when in ("before", "after"))
        start = None if self._kl is None else 0.0  # where it was measured
        before: dict[str, Any] = self._summarise(first) | {"kl": start} if first else {}
        after: dict[str, Any] = self._summarise(last) | {"kl": self._kl} if last else {}
        summary = {
            "task": config.task,
            "method": {k: getattr(config.method, k) for k in ("ref", "loss", "phases", "sampler", "beta")}
            | {"members": self._policy.num_members, "full": config.model.full},
            "model": config.model.path,
            "data": config.data.path,
            "annotator": config.annotator.path,
            "judge": judge,
            "win_rate_before": before.get("win_rate", {}).get(judge),
            "win_rate_after": after.get("win_rate", {}).get(judge),
            "judges": judges,
            "before": before,
            "after": after,
            "pairs": vars(counts),
            "steps": self.num_steps,
            "bad_steps": sum(line.get("bad_step", 0) for line in read_metrics(self._run.path)),
            "policy_version": self._policy.version,
            "seconds": seconds,
            "num_tokens": self._num_tokens,
            "tokens_per_s": self._num_tokens / max(1e-9, seconds.get("train", 0.0)),
            "peak_memory_gib": self._run_peak_gib(),
        }
        with self._run.critical():  # a run with a summary has finished, and has a report
            self._run.write_json("summary.json", summary)
            report.write_report(self._run.path)
        return summary

    def close(self) -> None:
        """Closes the metrics, the engine and the run."""
        self._metrics.close()
        self._parts.engine.close()
        self._run.close()

    def _save_moments(self, folder: Path, step: int) -> None:
        """Beside rank 0, in a thread: those of a step that rank 0 has taken, and without which there is no next one."""
        while self.num_steps < step:
            time.sleep(POLL_S)
        save_moments(folder, self._parts.optimizer, self._ranks)

    _note = ""
    _kl: float | None = None

    def _run_peak_gib(self) -> float:
        """Peak of the whole run, while the mark of the machine begins anew with every phase."""
        return max(self._peak_gib, peak_memory_gib())

    def _collect_new(self, phase: Phase) -> PhasePairs:
        owned = slice(phase.first_prompt, phase.last_prompt)
        if self._work.replayed is not None:
            pairs = self._work.replayed[owned]
            counts = PairCounts.of(pairs)
            if phase.index == 0:  # of the whole source
                counts += self._work.not_replayed
            return PhasePairs(phase.index, self.num_steps, pairs, counts, {})
        spare = self._work.spare
        if self._config.annotator.refill:
            spare = spare[sum(read_pairs(self._run.pairs_path(f)).num_spare for f in range(phase.index)) :]
        return self._collector.collect(phase, self._work.prompts[owned], spare, self.num_steps)

    def _score_reference(self, phase: Phase, found: PhasePairs) -> PhasePairs:
        if self._parts.reference.is_policy(phase.num_steps):
            # the reference of one step is the policy itself: no pass at all, the KL is left to the evaluations
            return replace(found, scored=True)
        title = f"phase {phase.index + 1}: reference"
        with self._run.timed("ref"), self._progress.task(title, len(found.pairs)) as task:
            if self._config.method.ref_logps == "sampler":
                tolerance = self._config.method.ref_logps_tolerance
                found = with_sampler_reference(found, self._policy, self._budget, tolerance=tolerance)
            else:
                found = with_reference(
                    found,
                    phase.num_steps,
                    self._policy,
                    self._parts.reference,
                    self._budget,
                    on_done=task.advance,
                    ranks=self._ranks,
                )
            ref, num = self._config.method.ref, self._config.eval.kl_prompts if self._ranks.is_main else 0
            sample = divergence(found.pairs[:num], self._policy, self._budget, ref=ref)
        metrics = found.metrics | {f"objective/{k}": v for k, v in sample.items()}
        return replace(found, metrics=metrics, scored=True)

    def _gradients(self, step: int, mine: Sequence[Pair], num_pairs: int) -> dict[str, Any]:
        """Of the whole step, of whose pairs these are this rank's."""
        config = self._config
        seed = (config.run.seed, step, self._ranks.rank) if config.model.lora_dropout else None
        sums = self._budget.run(
            lambda tokens: step_gradients(
                mine, self._policy, config.method, max_tokens=tokens, num_pairs=num_pairs, seed=seed
            )
        )
        return sum_over_ranks(sums, self._policy, self._ranks)

    def _write_pairs(self, path: Path, found: PhasePairs) -> None:
        if self._ranks.is_main:
            write_pairs(path, found)

    def _summarise(self, rows: list[EvalRow]) -> dict[str, Any]:
        num_aborted = len(self._work.held_out) - len(rows)
        return summarise(rows, [j.name for j in self._parts.judges]) | {"num_aborted": num_aborted}

    def _held_out_kl(self) -> float | None:
        """Nats a completion, on fresh samples of held-out prompts."""
        prompts = self._work.held_out[: self._config.eval.kl_prompts]
        if not prompts:
            return None
        sampling = self._config.sampling
        assert sampling.max_new_tokens, "resolve() has set it"
        params = SamplingParams(
            max_new_tokens=sampling.max_new_tokens, n=2, temperature=sampling.temperature, stop=sampling.stop or ()
        )
        # another run seed: held-out prompts have ids of their own and must not share streams with the training's
        sampled = self._parts.engine.generate(
            prompts, params, run_seed=self._config.run.seed + 1, policy_version=self.num_steps
        )
        pairs = [Pair(p, a, b, 1.0, 0.0) for p, (a, b) in zip(prompts, sampled, strict=True) if a.ids and b.ids]
        if not pairs:
            return None
        return divergence(pairs, self._policy, self._budget, ref="none")["kl"]

    def _is_last_chance(self, phase: Phase) -> bool:
        """Whether the run trains on the pairs of this phase or on none at all."""
        earlier = range(phase.index)
        return phase is self._work.plan.phases[-1] and not any(
            read_pairs(self._run.pairs_path(f)).pairs for f in earlier
        )

    def _stop_without_pairs(self, found: PhasePairs) -> None:
        path = self._run.path / "no-pairs.jsonl"
        self._write_pairs(path, found)
        counts = pairs_words(vars(found.counts))
        raise ValueError(f"phase {found.phase + 1}: no pair left to train on ({counts}); see {path}")

    def _stop_on_bad_steps(self, pairs: Sequence[Pair]) -> None:
        path = self._run.path / "bad-batch.jsonl"
        self._write_pairs(path, PhasePairs(self._phase, self.num_steps, tuple(pairs), PairCounts(kept=len(pairs)), {}))
        raise RuntimeError(
            f"loss or gradient not finite in {self._num_bad_steps} steps in a row (optim.max_bad_steps); see {path}"
        )
