"""Every kind of communication, on 3 ranks; what each call gives is checked by the program itself."""
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import trainverify as tv

RANKS = 3


def reference():
    model = nn.Linear(2, 2)
    return tv.Training(model, lambda: None)


def same(a, b):
    a = torch.as_tensor(a)
    assert a.dtype == torch.as_tensor(b).dtype and torch.equal(a, torch.as_tensor(b)), (a, b)


def mine(rank, shape=(3,), dtype=torch.float32):
    return (torch.arange(1, 1 + torch.Size(shape).numel()) + 10 * rank).reshape(shape).to(dtype)


def all_reduce(r, n):
    all_of = torch.stack([mine(q) for q in range(n)])
    for op, want in (("SUM", all_of.sum(0)), ("AVG", all_of.sum(0) / n), ("MAX", all_of.amax(0)), ("MIN", all_of.amin(0)), ("PRODUCT", all_of.prod(0))):
        x = mine(r)
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        same(x, want)
    x = mine(r)
    dist.all_reduce(x, op=dist._make_nccl_premul_sum(0.5))
    same(x, (all_of * 0.5).sum(0))
    flag = torch.tensor([r == 1, False])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    same(flag, torch.tensor([True, False]))
    count = torch.tensor([r + 1])
    dist.all_reduce(count)
    same(count, torch.tensor([6]))


def groups(r, n):
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 2])]
    for pair, ranks in zip(pairs, ([0, 2], [1, 2])):
        if r in ranks:
            x = mine(r)
            dist.all_reduce(x, group=pair)
            same(x, mine(ranks[0]) + mine(ranks[1]))
            y = mine(r)
            dist.broadcast(y, src=2, group=pair)
            same(y, mine(2))


def rooted(r, n):
    x = mine(r)
    dist.broadcast(x, src=1)
    same(x, mine(1))
    x = mine(r)
    dist.reduce(x, dst=2)
    if r == 2:
        same(x, mine(0) + mine(1) + mine(2))
    got = [torch.zeros(3) for _ in range(n)] if r == 1 else None
    dist.gather(mine(r), got, dst=1)
    if r == 1:
        same(torch.stack(got), torch.stack([mine(q) for q in range(n)]))
    out = torch.zeros(3)
    dist.scatter(out, [mine(q) * 2 for q in range(n)] if r == 0 else None, src=0)
    same(out, mine(r) * 2)


def gathers(r, n):
    out = torch.zeros(n * 3)
    dist.all_gather_into_tensor(out, mine(r))
    same(out, torch.cat([mine(q) for q in range(n)]))
    parts = [torch.zeros(3) for _ in range(n)]
    dist.all_gather(parts, mine(r))
    same(torch.stack(parts), torch.stack([mine(q) for q in range(n)]))
    uneven = [torch.zeros(q + 1) for q in range(n)]
    dist.all_gather(uneven, mine(r, (r + 1,)))
    same(torch.cat(uneven), torch.cat([mine(q, (q + 1,)) for q in range(n)]))
    squares = [torch.zeros(3, 3) for _ in range(n)]
    dist.all_gather(squares, mine(r, (3, 3)).t())             # not contiguous
    same(squares[1], mine(1, (3, 3)).t())


def reduce_scatters(r, n):
    total = torch.stack([mine(q, (n, 2)) for q in range(n)]).sum(0)
    out = torch.zeros(2)
    dist.reduce_scatter_tensor(out, mine(r, (n, 2)))
    same(out, total[r])
    out = torch.zeros(2)
    dist.reduce_scatter(out, list(mine(r, (n, 2)).unbind()))
    same(out, total[r])


def all_to_alls(r, n):
    out = torch.zeros(n, 2)
    dist.all_to_all_single(out, mine(r, (n, 2)))
    same(out, torch.stack([mine(q, (n, 2))[r] for q in range(n)]))
    send, receive = [q for q in range(n)], [r] * n            # q rows go to member q
    out = torch.zeros(n * r, 2)
    dist.all_to_all_single(out, mine(r, (n, 2)), receive, send)
    starts = [0, 0, 1]
    same(out, torch.cat([mine(q, (n, 2))[starts[r]:starts[r] + r] for q in range(n)]))
    outs = [torch.zeros(r + 1) for _ in range(n)]
    dist.all_to_all(outs, [mine(r, (q + 1,)) for q in range(n)])
    same(torch.stack(outs), torch.stack([mine(q, (r + 1,)) for q in range(n)]))


def point_to_point(r, n):
    right, left = (r + 1) % n, (r - 1) % n
    got = torch.zeros(3)
    work = dist.isend(mine(r), right)
    dist.recv(got, left)
    work.wait()
    same(got, mine(left))
    got = torch.zeros(3)
    ops = [dist.P2POp(dist.irecv, got, left), dist.P2POp(dist.isend, mine(r) * 3, right)]
    for w in dist.batch_isend_irecv(ops):
        w.wait()
    same(got, mine(left) * 3)
    if r == 0:                                 # two messages under two tags, taken in the other order
        dist.send(mine(0), 1, tag=5)
        dist.send(mine(0) * 2, 1, tag=6)
    elif r == 1:
        b, a = torch.zeros(3), torch.zeros(3)
        dist.recv(b, 0, tag=6)
        dist.recv(a, 0, tag=5)
        same(a * 2, b)
    if r == 0:                                 # two messages under one tag: the receives get them in the order of their issue
        works = [dist.isend(mine(0), 1), dist.isend(mine(0) * 3, 1)]
    elif r == 1:
        a, b = torch.zeros(3), torch.zeros(3)
        works = [dist.irecv(a, 0), dist.irecv(b, 0)][::-1]
    for w in works if r < 2 else ():
        w.wait()
    if r == 1:
        same(a, mine(0))
        same(b, mine(0) * 3)


def asynchronous(r, n):
    """Issued in one order, awaited in another."""
    a, b = mine(r), mine(r) * 2
    first = dist.all_reduce(a, async_op=True)
    second = dist.all_reduce(b, async_op=True)
    second.wait()
    assert first.is_completed()
    same(a * 2, b)
    future = dist.all_reduce(mine(r), async_op=True).get_future()
    same(future.wait()[0], mine(0) + mine(1) + mine(2))


def orders(r, n):
    """Two groups used in different orders, and a message that overtakes a collective: both are right as long as nobody waits early."""
    other = dist.new_group([0, 1, 2])
    x, y = mine(r), mine(r) * 2
    issue = [lambda: dist.all_reduce(x, async_op=True), lambda: dist.all_reduce(y, group=other, async_op=True)]
    for w in [i() for i in (issue if r else issue[::-1])]:
        w.wait()
    same(x * 2, y)
    if r == 1:
        dist.recv(torch.zeros(3), 0)
    z = mine(r)
    work = dist.all_reduce(z, async_op=True)
    if r == 0:
        dist.send(mine(0), 1)
    work.wait()
    same(z, mine(0) + mine(1) + mine(2))


def functional(r, n):
    world = dist.group.WORLD
    everyone = [mine(q, (n, 2)) for q in range(n)]
    same(funcol.all_reduce(mine(r), "sum", world) + 0, mine(0) + mine(1) + mine(2))
    same(funcol.all_gather_tensor(mine(r, (n, 2)), 1, world) + 0, torch.cat(everyone, 1))
    same(funcol.reduce_scatter_tensor(mine(r, (n, 2)), "avg", 0, world) + 0, (sum(everyone) / n)[r:r + 1])
    same(funcol.all_to_all_single(mine(r, (n, 2)), None, None, world) + 0, torch.stack([e[r] for e in everyone]))
    same(funcol.broadcast(mine(r), 1, world) + 0, mine(1))
    for got, want in zip(funcol.all_reduce_coalesced([mine(r), mine(r) * 2], "sum", world), (1, 2)):
        same(got + 0, (mine(0) + mine(1) + mine(2)) * want)
    for got in funcol.all_gather_into_tensor_coalesced([mine(r), mine(r)], world):
        same(got + 0, torch.cat([mine(q) for q in range(n)]))
    for got in funcol.reduce_scatter_tensor_coalesced([mine(r), mine(r)], "sum", [0, 0], world):
        same(got + 0, (mine(0) + mine(1) + mine(2))[r:r + 1])
    x = mine(r, (n, 2)).requires_grad_()
    funcol.all_gather_tensor_autograd(x, 0, world).sum().backward()
    same(x.grad, torch.full((n, 2), 3.0))
    x = mine(r, (n, 2)).requires_grad_()
    funcol.all_to_all_single_autograd(x, None, None, world).pow(2).sum().backward()
    same(x.grad, 2 * x.detach())
    x = mine(r)
    funcol.all_reduce_inplace(x, "sum", world)
    same(x, mine(0) + mine(1) + mine(2))


def objects(r, n):
    got = [None] * n
    dist.all_gather_object(got, {"rank": r, "list": [r] * r})
    assert got == [{"rank": q, "list": [q] * q} for q in range(n)]
    box = [f"from {r}"]
    dist.broadcast_object_list(box, src=2)
    assert box == ["from 2"]
    dist.barrier()


KINDS = {f.__name__: f for f in (all_reduce, groups, rooted, gathers, reduce_scatters, all_to_alls, point_to_point, asynchronous, orders,
                                  functional, objects)}


def parallel(ref, kind):
    model = nn.Linear(2, 2)
    model.load_state_dict(ref.weights)

    def step():
        for f in [f for f in KINDS.values() if f is not orders] if kind == "every" else [KINDS[kind]]:
            f(dist.get_rank(), dist.get_world_size())

    return tv.Training(model, step)
