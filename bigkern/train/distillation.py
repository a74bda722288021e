"""Learning from another model (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.train.errors import UserError
from bigkern.train.loop import Task


def soft_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The divergence KL(teacher, student) of the softened predictions, in nats, the mean over all
    but the last dimension, times temperature^2, so that its gradients keep their size (section 2).

    Both logits are [..., classes].
    """
    student, teacher = (
        (x.float() / temperature).log_softmax(-1).flatten(0, -2) for x in (logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distillation_task(task: Task, teacher: nn.Module, temperature: float, weight: float) -> Task:
    """`task` with the loss weight * soft_loss + (1 - weight) * the task's own. The teacher isn't
    trained."""
    teacher.eval()

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(inputs)
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        hard = task.loss(lambda _: logits, inputs, labels)
        return weight * soft_loss(logits, teacher_logits, temperature) + (1 - weight) * hard

    return replace(task, loss=loss)


@torch.no_grad()
def check_teacher(student: nn.Module, teacher: nn.Module, inputs: Tensor) -> None:
    """Raises UserError where the teacher doesn't take `inputs`, or predicts something else."""
    wanted = list(student(inputs).shape)
    try:
        found = list(teacher(inputs).shape)
    except ValueError as error:
        raise UserError(f"the teacher can't read what the run reads: {error}") from error
    if found != wanted:
        raise UserError(f"the teacher's logits must have the run's shape {wanted}, got {found}")
