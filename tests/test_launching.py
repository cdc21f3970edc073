"""Processes that a launcher started: they meet in one group, and leave it when the script ends."""

from script_runs import command, run

SCRIPT = """
import atexit
from torch.distributed import is_initialized
atexit.register(lambda: print(f"at its end in a group: {is_initialized()}\\n", end="", flush=True))
from si_distill.launching import join_processes
state = join_processes()
state.wait_for_everyone()  # as every script does: a process that leaves while another joins would fail that one
print(f"{state.process_index} of {state.num_processes}, in a group: {is_initialized()}\\n", end="", flush=True)
"""


def test_processes_leave_their_group_at_the_end_of_the_script(tmp_path):
    # A gloo group that the interpreter's end takes down now and then aborts a process that has done all its work.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    printed = run(*command(script, processes=2)).stdout
    assert sorted(printed.splitlines()) == [
        "0 of 2, in a group: True",
        "1 of 2, in a group: True",
        "at its end in a group: False",
        "at its end in a group: False",
    ]
