"""
Two rows of benchmark.py step by step in turn: what a noisy machine does to the one it does to the other.
"""

import statistics
import subprocess

from utils import RunError


class Player:
    """A process that takes one step for each line it is sent, and tells its seconds (timing.Clock with turns)."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)

    def wait(self):
        """The seconds of the step under way."""
        for line in self.process.stdout:
            if line.startswith('TURN '):
                return float(line[5:])
        raise RunError('a row that was to be measured in turn has stopped; measure it alone with --only')

    def step(self):
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        return self.wait()

    def stop(self):
        self.process.kill()
        self.process.communicate()


def in_turn(first, second, rounds):
    """Two commands' steps in turn, after both have warmed up -> row: the median ratio of neighbouring steps."""
    players = []
    try:
        for command in (first, second):
            players.append(Player(command))
            players[-1].wait()  # warm
        pairs = [[player.step() for player in players] for _ in range(rounds)]
    finally:
        for player in players:
            player.stop()
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    low, high = min(ratios), max(ratios)
    return dict(ratio=statistics.median(ratios), seconds_step=medians[0], steps=rounds,
                note=f'in turn with the other, {medians[1]:.3g} s; ratios {low:.2f} .. {high:.2f}')
