"""The playground: who may call it, blind order, picks that last. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
any-origin-may-pick in eval.playground: Handler.is_foreign
Every page that is open in the browser could add picks.
- host not in (f"{HOST}:{port}", f"localhost:{port}") or not ours
+ host not in (f"{HOST}:{port}", f"localhost:{port}")
test_playground.py::test_other_hosts_and_origins_are_refused

any-host-may-pick in eval.playground: Handler.is_foreign
DNS rebinding: a page whose host name leads to 127.0.0.1 has the same origin as its own requests.
- host not in (f"{HOST}:{port}", f"localhost:{port}") or not ours
+ not ours
test_playground.py::test_other_hosts_and_origins_are_refused

forms-may-pick in eval.playground: Handler.do_POST
A form of another page sends a body without being asked whether it may.
- self.is_foreign() or not is_json
+ self.is_foreign()
test_playground.py::test_a_form_of_another_page_is_refused

the-policy-is-always-a in eval.playground: Playground.ask
A person who likes the left side would then train on that, and nothing is blind.
- order = self.random.sample((0, 1), 2)
+ order = [0, 1]
test_playground.py::test_the_order_is_random_and_the_record_names_the_model_of_its_text

names-do-not-follow-the-sides in eval.picks: Comparison.record_of
The pair is right, and the wins are counted for the wrong model.
- self.models[:: 1 - 2 * side]
+ self.models
test_playground.py::test_the_order_is_random_and_the_record_names_the_model_of_its_text

pick-not-synced in files: append_synced
The page shows a pick that a power cut still loses.
- os.fsync(file.fileno())
+ pass
test_playground.py::test_a_pick_is_on_the_disk_before_its_reply

half-a-pick-stays in files: append_synced
After a full disk the next pick continues the torn line, and training stops there.
- file.truncate(length)
+ pass
test_playground.py::test_a_pick_is_on_the_disk_before_its_reply

picked-twice in eval.playground: Playground.pick
A second click, or a second tab, counts a pair twice.
- self.picks.records.get(id)
+ None
test_playground.py::test_two_tabs_or_a_second_click_save_one_pick

cut-answers-are-picked in eval.picks: Comparison.pickable
Training on it teaches the model to end in the middle of a sentence.
- bool(text.strip()) and not cut
+ bool(text.strip())
test_playground.py::test_an_answer_that_was_cut_off_cannot_be_picked

torn-pick-stays in eval.picks: Picks.__init__
A crash in mid-write leaves half a line; the next start refuses the file.
- mend(file)
+ pass
test_playground.py::test_a_line_that_a_crash_has_cut_is_removed
""")
