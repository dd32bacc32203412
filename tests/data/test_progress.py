"""Progress in a log file: one line per stage, with the speed."""

from vqmoe_megatron.data.progress import PrepareProgress


def test_plain_lines_say_how_far_and_how_fast(capsys):
    with PrepareProgress() as progress:
        progress.stage("train", 3_000_000)
        for _ in range(3):
            progress.advance(1_000_000)
        progress.note("done [really]")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: 3.0 of 3.0 MB, ") and lines[0].endswith(" MB/s")
    assert lines[1] == "done [really]"
