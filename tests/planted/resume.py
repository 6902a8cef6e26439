"""Resuming and faults. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
no-fsync in files: write_whole
A file is renamed before its bytes are on the disk; a power cut leaves its name and nothing in it.
- os.fsync(file.fileno())
test_checkpoint.py::test_a_crash_at_any_moment_leaves_a_whole_checkpoint[2]

folder-not-synced in files: write_whole
The new file is safe, its name is not: after a power cut the newest checkpoint is gone.
- sync(path.parent)
test_checkpoint.py::test_a_crash_at_any_moment_leaves_a_whole_checkpoint[2]

pruned-before-written in training.checkpoint: save_checkpoint
Old checkpoints go first, to save room; a crash then leaves none.
- name = ...
+ name = ...
+ for old in checkpoints(folder)[keep - 1:]:
+     old.unlink()
test_checkpoint.py::test_a_crash_at_any_moment_leaves_a_whole_checkpoint[1]

digest-not-checked in training.checkpoint: load_checkpoint
torch.load takes a flipped bit for a weight, and so would the run.
- file_hash(file) != NAME.fullmatch(path.name)[2]
+ False
test_checkpoint.py::test_every_flipped_bit_is_found

checkpoint-is-unpickled in training.checkpoint: load_checkpoint
A checkpoint from elsewhere runs whatever code it holds.
- torch.load(file, map_location="cpu", mmap=True, weights_only=True)
+ torch.load(file, map_location="cpu", mmap=True, weights_only=False)
test_checkpoint.py::test_a_hostile_file_runs_nothing

damaged-file-counts-as-kept in training.checkpoint: newest_valid
Pruning by number keeps the damaged file and removes a good one.
- set_aside(damaged)
test_checkpoint.py::test_a_damaged_file_falls_back_and_is_named

moments-by-place in training.checkpoint: check_moments
Moments are assigned by position, so a changed order gives them to the wrong parameters.
- if then != now:
-     ...
+ if False:
+     ...
test_checkpoint.py::test_state_that_does_not_fit_is_refused

moments-of-another-type in training.checkpoint: check_tensor
AdamW multiplies fp16 moments into the weights; with another shape it reads beyond their end.
- saved.dtype != dtype
+ False
test_checkpoint.py::test_a_forged_checkpoint_is_refused_before_anything_changes[fp16 moments]

optimizer-not-restored in train_sft: train
AdamW starts anew: the first steps after a resume are far too large, and nobody notices.
- {"model": trained_part(model), "optimizer": optimizer, "precision": precision, "meter": meter}
+ {"model": trained_part(model), "precision": precision, "meter": meter}
test_resume.py::test_resuming_at_any_step_changes_no_bit[train_sft-fp32]

loss-scale-not-restored in training.precision: Precision.load_state_dict
fp16 starts with a scale that overflows, and skips steps that it had taken.
- self.scaler.load_state_dict(saved["scaler"])
test_resume.py::test_resuming_restores_the_loss_scale_and_its_skips

resumed-a-step-late in train_sft: train
Off by one: each interruption skips a window of data.
- range(first_step, total_steps)
+ range(first_step + bool(first_step), total_steps)
test_resume.py::test_resuming_at_any_step_changes_no_bit[train_sft-fp32]

checkpoint-a-step-behind in train_sft: train
A checkpoint that names the step before is resumed into taking its step twice.
- run.save_when_due(done)
+ run.save_when_due(step)
test_resume.py::test_each_row_is_logged_once

reference-copied-after-resume in train_dpo: train
The reference is what the policy had become: DPO starts anew at ln 2.
- first_step = run.begin(..., **...)
+ first_step = run.begin(..., **...)
+ reference.load_state_dict(model.state_dict())
test_resume.py::test_the_reference_stays_the_original_one

rows-logged-twice in training.metrics: rows_until
Steps that a killed run had logged after its checkpoint stand in the log twice.
- json.loads(line)["step"] <= step
+ json.loads(line)
test_resume.py::test_each_row_is_logged_once

changed-settings-accepted in training.identity: require_same_run
A run continues with another learning rate or data, and its config.json contains only the last.
- other.keys() - allowed
+ False
test_resume.py::test_a_changed_setting_is_refused_by_name[beta]

old-settings-come-back in training.checkpoint: restore
The optimizer's saved state brings its own weight decay, whatever the flags say.
- {"state": moments, "param_groups": part.state_dict()["param_groups"]}
+ state
test_resume.py::test_an_overridden_setting_takes_effect

stopped-run-thrown-away in training.folder: require_replaceable
A start without --resume removes the checkpoints of a night's work.
- (left := checkpoints(folder / CHECKPOINTS))
+ (left := [])
test_resume.py::test_a_fresh_run_does_not_remove_a_stopped_one

finished-run-replaced in training.folder: require_replaceable
The same command typed twice replaces a model that took a night.
- is_finished(folder)
+ False
test_resume.py::test_a_finished_run_is_replaced_only_with_overwrite

files-of-others-removed in training.checkpoint: is_checkpoint_file
`--out .` in a project removes everything in its folder `checkpoints`.
- bool(ANY_NAME.fullmatch(name))
+ True
test_folder.py::test_out_in_a_project_loses_nothing

finished-on-other-data in training.identity: require_same_finished_run
A pipeline that runs again on new data gets the old model back, with status 0.
- {*settings.to_dict(), *DIGESTS}
+ {*settings.to_dict()} - {*DIGESTS}
test_resume.py::test_another_model_or_data_is_not_a_finished_run

last-step-not-saved in training.run: RunFolder.finish
The disk is full when the model is written, and everything since the last checkpoint is lost.
- self.saved_step < self.step
+ False
test_folder.py::test_a_full_disk_at_the_end_loses_nothing[0]

ruined-weights-resumed in training.run: RunFolder._set_aside
A checkpoint whose loss is NaN is the newest one, and every restart resumes it.
- checkpoint.step_of(path) == step
+ False
test_faults.py::test_the_kept_checkpoint_is_older_than_ruined_weights[2]

forwarded-signal-counted in training.run: RunFolder._note_signal
Slurm and torchrun both send SIGTERM, and the second one kills the run before it has saved.
- time.monotonic() - self.signal_time < REPEATS
+ False
test_folder.py::test_under_torchrun_a_late_sigterm_stops_at_once[1-False]

old-model-left-standing in training.folder: remove_run
When a run dies, the model of an earlier one is still there and is taken for its result.
- (folder / name).unlink(missing_ok=True)
+ pass
test_resume.py::test_an_unfinished_run_has_no_model

signal-ends-in-success in training.run: RunFolder.save_when_due
Status 0 after a signal: the shell goes on with half a model.
- SystemExit(128 + number)
+ SystemExit(0)
test_faults.py::test_a_signal_saves_after_the_step_and_leaves[2-SIGTERM]

signal-without-a-save in training.run: RunFolder.save_when_due
The run leaves in good order, and without its last hours.
- number or (every and step % every == 0)
+ every and step % every == 0
test_faults.py::test_a_signal_saves_after_the_step_and_leaves[2-SIGTERM]

no-lock in training.folder: take_lock
Two runs write one folder.
- fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
+ pass
test_faults.py::test_a_folder_has_one_owner

nan-weights-saved in training.run: RunFolder._save
The newest checkpoint is NaN, and every restart resumes it.
- self.world.largest(int(not checkpoint.is_finite(state)))
+ False
test_faults.py::test_weights_that_are_not_finite_are_never_saved

skips-without-end in training.schedule: require_finite
fp16 may skip every step of a run, and the loss that it logs looks well.
- precision.skipped_in_a_row <= MOST_SKIPS
+ True
test_faults.py::test_skipped_steps_are_counted_and_bounded

torn-cache-read in dataset.store: TokenStore.__init__
Arrays that were cut short are read as other ids for the same rows.
- not len(self.tokens) == len(self.supervised) == self.bounds[-1, -1]
+ False
test_store.py::test_a_torn_cache_is_refused[0.5-tokens.bin]

# ---- The best weights

best-by-the-lowest-accuracy in training.run: RunFolder.keep_best
One sign for all metrics: the weights with the worst accuracy are kept.
- sign = -1 if metric.endswith("loss") else 1
+ sign = -1
test_best.py::test_the_best_weights_are_those_of_the_step_with_the_best_figure[eval_rewards/accuracies-options1]

best-forgotten-by-a-resumed-run in training.run: RunFolder._take_folder
The first evaluation after a resume counts as the best, and replaces better weights.
- self.best = self._best_so_far()
test_best.py::test_a_kill_leaves_the_best_and_a_resumed_run_ends_with_the_same
""")
