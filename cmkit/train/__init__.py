"""Training: a generator of steps, whose caller shows progress, saves and stops."""

from cmkit.train.loop import Step, train
from cmkit.train.optimizer import learning_rate
from cmkit.train.training import Training, start
