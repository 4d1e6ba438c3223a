"Bad input and corner cases of `facelab.comparison`"
import os
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from facelab.comparison import *
from facelab.comparison import _place
from facelab.datasets import IdentityLeak
from facelab.metrics import score_pairs

torch.set_num_threads(1)

def faces(counts, side=8):
    "Pixels and a table: person i has counts[i] photos"
    who = np.repeat(np.arange(len(counts)), counts)
    pixels = np.random.default_rng(0).integers(0, 256, (len(who), side, side, 3), dtype=np.uint8)
    return pixels, pd.DataFrame(dict(row=range(len(who)), person=[f'p{i}' for i in who]))

def out(e, cosines=None, relate=None): return cosines, None, e, relate

@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 5, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])

def test_groups_never_repeat_a_photo_and_keep_to_a_person():
    pixels, t = faces([2, 3, 7]); pixels[:] = np.arange(12)[:, None, None, None]
    v = GroupViews(pixels, pd.factorize(t.person)[0], m=2)
    assert v.people.tolist() == [0, 1, 2, 2, 2]
    for _ in range(20):
        x, who, _ = v[[0, 1, 4]]
        shown = x[:, 0, 0, 0].tolist()
        assert who.tolist() == [0, 0, 1, 1, 2, 2] and set(shown[:2]) == {0, 1} and set(shown[2:4]) <= {2, 3, 4} and set(shown[4:]) <= set(range(5, 12)) and len(set(shown)) == 6

def test_groups_follow_the_seed():
    pixels, t = faces([9, 9]); v = GroupViews(pixels, pd.factorize(t.person)[0])
    torch.manual_seed(3); a = v[[0, 4]][0]
    torch.manual_seed(3); assert torch.equal(a, v[[0, 4]][0])

def test_a_person_with_one_photo_is_refused():
    pixels, t = faces([2, 1])
    with pytest.raises(ValueError, match='fewer than 2 photos, such as number 1'): GroupViews(pixels, pd.factorize(t.person)[0])

def test_contrastive_against_a_loop(batch):
    e, who = batch; u = F.normalize(e).tolist(); same, other = [], []
    for i in range(8):
        for j in range(i + 1, 8):
            d = sum((a - b)**2 for a, b in zip(u[i], u[j]))**.5
            if who[i] == who[j]: same.append(d*d/2)
            else: other.append(max(1 - d, 0)**2/2)
    assert ContrastiveGroups()(out(e), who, None).item() == pytest.approx(np.mean(same) + np.mean(other), abs=1e-5)

def test_triplets_against_a_loop(batch):
    e, who = batch; u = F.normalize(e).detach().numpy(); lost = []
    for a in range(8):
        for p in range(8):
            for n in range(8):
                if a == p or who[a] != who[p] or who[a] == who[n]: continue
                dp, dn = ((u[a] - u[p])**2).sum(), ((u[a] - u[n])**2).sum()
                if dp < dn < dp + .5: lost.append(dp - dn + .5)
    assert TripletGroups(.5)(out(e), who, None).item() == pytest.approx(np.mean(lost), abs=1e-5)

def test_l1_against_a_loop(batch):
    e, who = batch; u = F.normalize(e).detach().numpy(); costs = {True: [], False: []}
    for i in range(8):
        for j in range(i + 1, 8):
            z = 10*(1.5*(.5 - np.abs(u[i] - u[j]).sum()/5**.5) + .1); same = bool(who[i] == who[j])
            costs[same].append(np.log1p(np.exp(-z if same else z)))
    got = L1Groups()(out(e, relate=torch.tensor([1.5, .1])), who, None)
    assert got.item() == pytest.approx((np.mean(costs[True]) + np.mean(costs[False]))/2, abs=1e-5)

@pytest.mark.parametrize('loss', [ContrastiveGroups(), TripletGroups(), L1Groups()])
def test_gradients_are_finite_even_for_identical_faces(loss):
    e = torch.ones(4, 6, requires_grad=True); relate = torch.tensor([1., 0.], requires_grad=True)
    loss(out(e, relate=relate), torch.tensor([0, 0, 1, 1]), None).backward()
    assert torch.isfinite(e.grad).all()

def test_arcface_beyond_half_a_turn_is_finite():
    c = torch.tensor([[-1., 1.], [.5, -1.]], requires_grad=True)
    ArcFaceLabels()(out(None, c), torch.tensor([0, 1]), None).backward()
    assert torch.isfinite(c.grad).all()

def test_recipes_of_losses_can_be_written_down():
    import json
    kinds = [json.dumps(vars(make())) for make in LOSSES.values()]
    assert len(set(kinds)) == 5

def test_even_threshold_is_balanced():
    rng = np.random.default_rng(0)
    t = pd.DataFrame(dict(score=np.r_[rng.normal(1, 1, 300), rng.normal(-1, 1, 30_000)], mated=[True]*300 + [False]*30_000))
    assert abs(even_threshold(t)) < .6
    with pytest.raises(ValueError, match='0 are mated'): even_threshold(t[~t.mated])

def test_eer_row_needs_five_people():
    p = score_pairs(np.eye(8), list('aabbccdd'))
    with pytest.raises(ValueError, match='five of them'): eer_row(p)

def test_who_learns_may_not_judge(tmp_path):
    pixels, t = faces([2]*6)
    for f in (what_loss, what_start):
        with pytest.raises(IdentityLeak, match='6 people'): f(pixels, t, t, tmp_path, *([{}] if f is what_start else []))
    with pytest.raises(IdentityLeak): what_cut({'whole photo': pixels}, t, t, tmp_path)
    assert not list(tmp_path.iterdir())

def test_names_become_folders():
    names = [*LOSSES, *CUTS]; assert len({_place('a', o) for o in names}) == len(names) and _place('a', 'BCE on L1').name == 'bce-on-l1' and _place(None, 'b') is None

def test_city_tower_scores_are_city_block_distances():
    from facelab.embed import similarity
    v = CityTower(torch.nn.Identity())(torch.tensor([[3., 4.], [1., 0.], [0., 2.]])).numpy()
    assert np.allclose(similarity(v, v, 'l1'), -np.array([[0, 1.2, .8], [1.2, 0, 2], [.8, 2, 0]]), atol=1e-6)

def test_cut_photo_of_any_mode(tmp_path):
    from PIL import Image
    from facelab.detect import Box
    for mode in ('L', 'RGB', 'RGBA', 'P'):
        Image.new(mode, (90, 120)).save(tmp_path/'a.png')
        for how in CUTS[:2]: assert np.asarray(cut_photo(tmp_path/'a.png', Box(10, 80, 90, 10), how, 32)).shape == (32, 32, 3)

def test_a_damaged_cache_file_is_no_pickle(tmp_path):
    np.save(tmp_path/'a.npy', np.array([dict()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError): cut_photos(pd.DataFrame(dict(path=[], box=[])), 'whole photo', 8, tmp_path/'a.npy')

def test_a_start_of_another_network_is_refused(tmp_path):
    from facelab.embed import Encoder, save_encoder
    from facelab.pretrain import face_tower
    pixels, t = faces([2]*4); f = tmp_path/'a.safetensors'
    save_encoder(Encoder(face_tower('resnet34'), 'a', 32, 512), f, 'faces', arch='resnet34')
    with pytest.raises(ValueError, match='no body of resnet18'): what_start(pixels, t[:4], t[4:], None, dict(a=f), seeds=[0], size=32)
    with pytest.raises(FileNotFoundError): what_start(pixels, t[:4], t[4:], None, dict(a=tmp_path/'none.safetensors'), seeds=[0], size=32)

def test_tables_survive_a_round_trip_and_refuse_others(tmp_path):
    assert read_table(tmp_path/'none.csv', TRAININGS).empty
    pd.DataFrame([dict.fromkeys(MEASURED, 1) | dict(system='a', init='')])[MEASURED].to_csv(tmp_path/'m.csv', index=False)
    assert read_table(tmp_path/'m.csv', MEASURED).init.tolist() == ['']
    with pytest.raises(ValueError, match='lacks the columns'): read_table(tmp_path/'m.csv', TRAININGS)

def test_a_table_of_nothing_is_a_table():
    from facelab.protocols import RESULT_COLUMNS
    none = [pd.DataFrame(columns=c) for c in (RESULT_COLUMNS, MEASURED, TRAININGS)]
    assert len(all_systems(*none)) == 0
    only = pd.DataFrame([dict(zip(TRAININGS, ['new', 'AT&T s01 to s30', 300, 30, 12., 'one core', '']))])
    t = all_systems(none[0], none[1], only)
    assert t.loc['new', ('cost', 'minutes')] == '12 (one core)' and (t.drop(columns=[('cost', 'minutes')]) == '-').all().all()
    why = why_empty(t, {'new': 'AT&T s01 to s30'}); assert why.why.str.startswith('barred').sum() == 2 and len(why) == 5

def test_barred_people(): assert barred('AT&T s01 to s30', 'att-one-photo') and not barred('LFW View 1', 'att-one-photo') and not barred('AT&T s01 to s30', 'lfw-view1')

def test_measure_all_keeps_what_is_there(tmp_path):
    csv = tmp_path/'m.csv'
    pd.DataFrame([dict.fromkeys(MEASURED, np.nan) | dict(system='a', test='att-new-people', init='', licence='', rank1=.5)])[MEASURED].to_csv(csv, index=False)
    absent = measure_all(csv, dict(a=('no such', ''), b=(tmp_path/'gone.safetensors', '')), ['att-new-people'])
    assert list(absent) == [('b', 'att-new-people')] and 'gone' in absent['b', 'att-new-people'] and read_table(csv, MEASURED).rank1.tolist() == [.5]

def test_races_need_the_same_questions():
    a = pd.DataFrame(dict(left_person=list('abcd'), right_person=list('bcda'), right=[True]*4))
    with pytest.raises(ValueError, match='different questions'): races(dict(a=a, b=a.iloc[::-1]))
    assert list(races(dict(a=a)).columns) == ['errors', 'of']

def test_plot_has_a_line_for_each_training():
    import matplotlib.pyplot as plt
    t = pd.DataFrame(dict(eer=[.1, .2], lo=[.05, .1], hi=[.2, .3], people=[6, 6]), index=['a', 'b'])
    assert len(plot_ablation(t).axes) == 1; plt.close('all')
