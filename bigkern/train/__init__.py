"""Training of the reference models, in the order in which it is best read.

config        what a run is told: TrainConfig, CnnConfig, TransformerTrainConfig
loop          train(): the one training loop, which knows no model
images        classifying images: data, loss and report around that loop, for any model
cnn           the CNN's run
transformer   the Transformer's: a language model of a text, or the digits row by row
data          the digits, MNIST, and how their images become the model's input
text          the text that a language model learns
distributed   training by the processes of torchrun
compare       what is shown of a run, and of two side by side
checkpoint    saving and restoring a run so that no kill can break it
metrics       accuracy, per-class scores, memory, and the log of a run
saved         a run's model and data, read again for use
predict       evaluate a run, and classify images with it
generate      write with a language model's run
compress      a smaller, faster run of a run: its steps, and the report
pruning       weights set to 0, or whole channels taken out
distillation  learning from another model
quantization  INT8 layers, and their calibration
measure       what a model costs: numbers, bytes, time
errors        UserError, the one exception that the command line prints
"""
