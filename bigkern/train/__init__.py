"""Training of the reference models, in the order in which it is best read.

config      what a run is told: TrainConfig, CnnConfig
loop        train(): the one training loop, which knows no model
cnn         the CNN's task: data, model, loss and report around that loop
data        the digits, MNIST, and how their images become the model's input
checkpoint  saving and restoring a run so that no kill can break it
metrics     accuracy, per-class scores, memory, and the log of a run
predict     evaluate and classify with a run's latest checkpoint
errors      UserError, the one exception that the command line prints
"""
