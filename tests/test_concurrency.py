"""Eight threads sample while one trains. The battery does it for a minute."""

from tests.concurrency import Storm


def test_threads_sampling_beside_training_get_the_answers_of_their_weights(tiny_model, tmp_path):
    storm = Storm(tiny_model, tmp_path, threads=8, rounds=6, seconds=0)
    storm.run()
    assert len(storm.answers) >= 16 and len({version for version, *_ in storm.answers}) > 2
    storm.check()
