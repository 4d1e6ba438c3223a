"Losses against plain loops, where they pull, and what they refuse to do"
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facelab.losses import (L1Head, all_triplets, arcface_logits, contrastive_loss, cosface_logits, l1_loss_of_pairs, semi_hard,
                            squared_distances, triplet_loss)


@pytest.mark.parametrize('seed', range(5))
def test_distances_and_triplets_by_loops(seed):
    g = torch.Generator().manual_seed(seed)
    e, y = torch.randn(9, 4, generator=g), torch.randint(0, 3, (9,), generator=g)
    d = squared_distances(e)
    for i in range(9):
        for j in range(9): assert d[i, j] == pytest.approx(float(((e[i] - e[j])**2).sum()), abs=1e-5)
    want = {(a, p, n) for a in range(9) for p in range(9) for n in range(9) if a != p and y[a] == y[p] and y[a] != y[n]}
    assert {tuple(o) for o in torch.stack(all_triplets(y), 1).tolist()} == want
    semi = {(a, p, n) for a, p, n in want if d[a, p] < d[a, n] < d[a, p] + 1.}
    assert {tuple(o) for o in torch.stack(semi_hard(e, y, 1.), 1).tolist()} == semi


def test_photos_that_are_nearly_alike_keep_their_digits():
    e = torch.full((2, 128), 100.); e[1, 0] += 1e-3
    assert float(squared_distances(e)[0, 1]) == pytest.approx(1e-6, rel=.05)


@pytest.mark.parametrize('margin', [.5, 1., 2.])
def test_contrastive_by_loop(margin):
    d, m = torch.rand(50)*3, torch.rand(50) < .5
    loop = np.mean([.5*x**2 if y else .5*max(margin - x, 0)**2 for x, y in zip(d.tolist(), m.tolist())])
    assert contrastive_loss(d, m, margin).item() == pytest.approx(loop, rel=1e-5)


def test_which_way_they_pull():
    d = torch.tensor([.4, .4, 1.2], requires_grad=True); contrastive_loss(d, torch.tensor([1, 0, 0])).backward()
    assert d.grad[0] > 0 and d.grad[1] < 0 and d.grad[2] == 0
    a, p, n = (torch.tensor([[x]], requires_grad=True) for x in (0., 1., 1.05)); triplet_loss(a, p, n).backward()
    assert p.grad > 0 and n.grad < 0
    far = torch.tensor([[9.]], requires_grad=True); triplet_loss(a.detach(), p.detach(), far).backward(); assert far.grad == 0


@pytest.mark.parametrize('angular, margin', [(cosface_logits, .35), (arcface_logits, .5)])
def test_angular_margins(angular, margin):
    c, y = torch.rand(20, 5)*2 - 1, torch.randint(0, 5, (20,))
    out, rows = angular(c, y, margin, 1.), torch.arange(20)
    assert (out[rows, y] < c[rows, y]).all()
    other = torch.ones(20, 5, dtype=bool); other[rows, y] = False; assert torch.equal(out[other], c[other])
    assert torch.allclose(angular(c, y, 0., 3.), 3*c, atol=1e-2)
    e = torch.tensor([[1., 0], [-1, 0]], requires_grad=True); F.cross_entropy(angular(F.normalize(e) @ torch.eye(2), torch.tensor([0, 0])), torch.tensor([0, 0])).backward()
    assert torch.isfinite(e.grad).all()


def test_l1_is_symmetric_and_learns():
    torch.manual_seed(0); head, a = L1Head(4), torch.randn(64, 4); m = torch.arange(64) % 2 == 0
    b = torch.where(m[:, None], a + .01, a + 1.); opt = torch.optim.Adam(head.parameters(), .1)
    assert torch.equal(head(a, b), head(b, a))
    for _ in range(60): loss = l1_loss_of_pairs(head(a, b), m); opt.zero_grad(); loss.backward(); opt.step()
    assert loss < .1 and ((head(a, b) > 0) == m).all()


def test_nobody_to_compare_with():
    e = torch.randn(4, 2)
    assert len(semi_hard(e, torch.zeros(4))[0]) == 0 and len(semi_hard(e, torch.arange(4))[0]) == 0
    empty = torch.zeros(0, 2); assert triplet_loss(empty, empty, empty) == 0
