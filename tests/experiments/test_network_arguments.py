"""What scripts that go through several networks say to bad arguments."""

import pytest

from experiments import convergence
from experiments.benchmarks import auxiliary_step


@pytest.mark.parametrize(
    "main, option", [(convergence.main, "--model"), (auxiliary_step.main, "--case")]
)
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mlpnet,vgg"], "'vgg' is not one of"),
        (["mlpnet", "--data-dir", "nowhere"], "--data-dir nowhere has no mnist"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(
    refuses, main, option, arguments, message
):
    refuses(main, [option, *arguments], message)
