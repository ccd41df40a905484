"""The loss alone, on logits, for any training loop: `python examples/01_losses_on_logits.py`."""

import torch

from tsdkd import tsd_kd_loss

torch.manual_seed(0)
batch, completion, vocab = 4, 32, 100
teacher_logits = 3 * torch.randn(batch, completion, vocab)
student_logits = torch.randn(batch, completion, vocab, requires_grad=True)
completion_mask = torch.arange(completion) < torch.tensor([32, 20, 7, 0]).unsqueeze(1)  # the last answer is empty

optimizer = torch.optim.SGD([student_logits], lr=20.0)
for step in range(5):
    terms = tsd_kd_loss(student_logits, teacher_logits, completion_mask)
    optimizer.zero_grad()
    terms.loss.backward()
    optimizer.step()
    print(
        f"step {step}: loss {terms.loss:.3f} = 0.1 · {terms.indirect:.3f} (ranking, {terms.opener_mask.sum()} opener tokens)"
        f" + {terms.direct:.3f} (gated JSD) + {terms.entropy:.3f} (entropy of {terms.top_entropy_mask.sum()} tokens)"
    )
print("mean gate on the longest answer:", f"{terms.gate[0].mean():.3f}")
