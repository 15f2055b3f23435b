"""verl issue 5983: with Ulysses context parallelism each rank holds a part of every sequence, but the number of tokens that
the loss is divided by was summed over the data-parallel ranks only: it lacks the tokens of the other context ranks."""
from kit import AllToAll, Attention, Net, load, loss_of, mesh_of, part, rows_of, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "C6", "link": "https://github.com/verl-project/verl/issues/5983", "diagnosis": "reweighted",
       "line": "tokens_in_batch = total(valid(labels), dp)", "also": ["loss = loss_of(model(tokens), labels, \"sum\") / tokens_in_batch"]}


def reference():
    return single(lambda: Net(attention=Attention))


class UlyssesAttention(Attention):
    """Trades the sequence for heads: attention sees whole sequences and this rank's heads."""

    cp = None

    def attend(self, q, k, v):
        q, k, v = (AllToAll.apply(t, self.cp, 1, 2) for t in (q, k, v))
        return AllToAll.apply(super().attend(q, k, v), self.cp, 2, 1)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, UlyssesAttention.cp = mesh.get_group("dp"), mesh.get_group("cp")
    model = load(Net(attention=UlyssesAttention), ref.weights)
    tokens, labels = (part(t, UlyssesAttention.cp, 1) for t in rows_of(ref.batch, dp))

    def backward():
        if fixed:
            tokens_in_batch = total(valid(labels))
        else:
            tokens_in_batch = total(valid(labels), dp)
        loss = loss_of(model(tokens), labels, "sum") / tokens_in_batch
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
