"""torchtitan PR 3257 and 2990: tokens were counted after context parallelism had cut the sequence, and the counts were summed over the
data-parallel ranks only. The number of tokens seen is too small by the context degree, and the validation loss is divided by
the tokens of one context rank's piece. The fix counts before the cut."""
import torch
from kit import Net, load, loss_of, mesh_of, part, rows_of, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "C11", "link": "https://github.com/pytorch/torchtitan/pull/3257", "diagnosis": "multiple",
       "line": "counted = labels", "also": ["val_loss = total(", "ntokens = total("]}


def reference():
    """Reports the loss before the update as validation does it: without gradients."""
    def loss(model, batch):
        return loss_of(model(batch["tokens"]), batch["labels"])

    made = single(loss=loss)
    model, batch = made.model, made.batch

    def step():
        with torch.no_grad():
            val_loss = loss(model, batch)
        return {"val_loss": val_loss, "ntokens": torch.tensor(float(batch["labels"].numel()))} | made.step()

    return type(made)(model, step, batch=batch)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp = mesh.get_group("dp"), mesh.get_group("cp")
    model = load(Net(), ref.weights)
    whole_tokens, whole_labels = rows_of(ref.batch, dp)
    tokens, labels = part(whole_tokens, cp, 1), part(whole_labels, cp, 1)
    if fixed:
        counted = whole_labels
    else:
        counted = labels

    def validate():
        with torch.no_grad():
            loss_sum = loss_of(model(tokens), labels, "sum")
        val_loss = total(loss_sum) / total(valid(counted), dp)
        return val_loss

    def backward():
        val_loss = validate()
        ntokens = total(torch.tensor(float(counted.numel())), dp)
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return {"loss": total(loss), "val_loss": val_loss, "ntokens": ntokens}

    return training(model, backward)
