"""Training: one loop, a generator; progress, saving and stopping belong to its caller."""

from cmkit.train.loop import Step, train
from cmkit.train.optimizer import learning_rate
from cmkit.train.training import Training, start
