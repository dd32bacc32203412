"""Reading the log behind its writer: every record once, whatever happens to the file."""

from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.metrics_tail import MetricsTail


def steps(records):
    return [record["iteration"] for record in records]


def test_records_come_once_and_in_parts(tmp_path):
    tail = MetricsTail(tmp_path, print)
    assert tail.read(10) == []
    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.append({"iteration": step, "loss": 0.5})
        assert steps(tail.read(3)) == [0, 1, 2]
        assert steps(tail.read(3)) == [3, 4]
        assert tail.read(3) == []
        log.append({"iteration": 5})
        assert tail.read(3) == [{"iteration": 5}]


def test_a_half_written_line_is_waited_for_and_a_damaged_one_reported(tmp_path):
    said = []
    tail = MetricsTail(tmp_path, said.append)
    with (tmp_path / "metrics.jsonl").open("wb", buffering=0) as file:
        file.write(b'{"iteration": 1}\n{"iter')
        assert steps(tail.read(10)) == [1]
        file.write(b'ation": 2}\nnot json\n["list"]\n{"iteration": 3}\n')
        assert steps(tail.read(10)) == [2, 3]
    assert len(said) == 2 and all("damaged line" in text for text in said)


def test_a_shortened_log_is_followed(tmp_path):
    tail = MetricsTail(tmp_path, print)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 5):
            log.append({"iteration": step})
        assert len(tail.read(10)) == 4
        log.truncate_after(2)  # another file under the same name
        log.append({"iteration": 3, "loss": 3.5})
        assert tail.read(10) == []  # 3 was read before
        log.append({"iteration": 5})
        assert steps(tail.read(10)) == [5]
        log.truncate_after(2)
        tail.rewind(2)
        log.append({"iteration": 3, "loss": 3.75})
        assert tail.read(10) == [{"iteration": 3, "loss": 3.75}]


def test_a_rewind_skips_nothing_that_was_not_read(tmp_path):
    tail = MetricsTail(tmp_path, print)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 7):
            log.append({"iteration": step})
        assert steps(tail.read(2)) == [1, 2]
        log.truncate_after(4)
        tail.rewind(4)
        assert steps(tail.read(10)) == [3, 4]
