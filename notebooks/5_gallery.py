# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 5. The gallery
#
# **What you will see.** One digit under ten attacks: what each changes, how much, and what the net then reads. Then
# two things that need not know the image at all: one perturbation that fools on many digits, and a patch that one
# could print and hold up to the camera.

# %%
import sparring  # before torch: see docs/decisions/003

# isort: split
import pictures
import torch
from IPython.display import display
from pictures import Strip

from sparring.core.threat import NORMS
from sparring.data import available

data = sparring.load("mnist" if available("mnist") else "digits")
mnist = data.name == "mnist"
conv = sparring.train("conv", data, steps=800 if mnist else 300).net
rows = data.test.take(60)

# %% [markdown]
# ## One image under each attack
#
# Attacks that look for the *nearest* image differ in how they measure distance, and one sees it: in $L_\infty$ every
# pixel moves a little, in $L_2$ some of them more, in $L_1$ few, in $L_0$ as few as can be, each as far as it likes.
# Some see gradients, some the scores, some the label alone. Two turn or disturb the image as a camera might; they are
# controls, and choose nothing.

# %%
reach = {norm: kind(0.0).length(torch.ones(1, rows.x[0].numel())).item() for norm, kind in NORMS.items()}
contest = [
    ("pgd", sparring.Linf(0.2)),
    ("fmn:steps=100", sparring.Linf(reach["linf"])),
    ("ddn:steps=100", sparring.L2(reach["l2"])),
    ("ead:steps=40,searches=4", sparring.L1(reach["l1"])),
    ("sigma_zero:steps=100", sparring.L0(reach["l0"])),
    ("one_pixel:steps=1000", sparring.L0(3)),
    ("square:steps=500", sparring.Linf(0.2)),
    ("hopskipjump:steps=800", sparring.L2(reach["l2"])),
    ("spatial", sparring.Unbounded()),
    ("corruption", sparring.Unbounded()),
]
found = {name: sparring.attack(conv, rows.x, rows.y, name, limits) for name, limits in contest}
fell = torch.stack([outcome.found & ~outcome.clean for outcome in found.values()])
row = int(fell.sum(0).argmax())  # the first of those that fell to the most attacks

# %%
for name, outcome in found.items():
    if not fell[list(found).index(name), row]:
        print(f"{name}: held")
        continue
    change = outcome.best[row] - rows.x[row]
    factor = 1 / float(change.abs().max())
    moved = change.flatten().double()
    size = f"Linf {moved.abs().max():.2f}, L2 {moved.norm():.2f},\n{int((moved != 0).sum())} values"
    before = pictures.said(outcome.clean_label[row : row + 1], outcome.clean_confidence[row : row + 1])
    after = pictures.said(outcome.label[row : row + 1], outcome.confidence[row : row + 1])
    pictures.trio(
        name, rows.x[row], change * factor, outcome.best[row], (before[0], f"x {factor:.1f}\n{size}", after[0])
    )
assert fell[:, row].sum() >= 6

# %% [markdown]
# ## Side by side
#
# `sparring.compare` gives every attack the same rows, the same judge and, with `budget`, the same passes through the
# network. *Optimality* (in `figures()`) is how near an attack comes to the best that any of them found, row by row.

# %%
compared = sparring.compare(
    conv, rows.x, rows.y, ["ddn", "fmn", "deepfool", "superdeepfool", "surfree"], sparring.L2(reach["l2"]), budget=200
)
display(compared)
eps = torch.linspace(0, compared.reach, 64).tolist()
(axes,) = pictures.charts()
colours = (pictures.BLUE, pictures.ORANGE, pictures.GREEN, pictures.PURPLE, pictures.SKY)
*curves, best = compared.curve(eps)
axes.plot(eps, best, color=pictures.GREY, linewidth=7, alpha=0.4, label="best of all, row by row")
for entry, curve, colour in zip(compared.entries, curves, colours, strict=True):
    axes.plot(eps, curve, color=colour, label=entry.name)
axes.set(title="Robust accuracy over eps, upper bounds", xlabel="eps (L2)")
pictures.percent(axes)
axes.legend()
pictures.plt.show()
nearest = max(zip(compared.optimality, compared.entries, strict=True), key=lambda pair: pair[0])[1]
print(f"nearest with 200 passes a row: {nearest.name}, median {nearest.median:.3f}")
assert nearest.name != "surfree"  # which sees the label alone

# %% [markdown]
# ## One perturbation for all images
#
# A universal perturbation (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401) is fitted on training images and then
# added to images it has never seen. The control beside it is noise of the same size.

# %%
budget = 0.2
universal = sparring.fit_universal(conv, data.train.take(500), sparring.Linf(budget), steps=200)
for name, made in (("fitted", universal), ("random signs", universal.control())):
    print(f"{name}: fools on {pictures.share(made.judge(conv, data.test.take(300)).rate)} of new images")
few = rows.take(6)
pictures.strips(
    Strip("new images", few.x),
    Strip("x 5", (universal.delta / budget).expand_as(few.x), signed=True),
    Strip("sum", universal.apply(few.x), [str(label) for label in conv(universal.apply(few.x)).argmax(1).tolist()]),
)
assert universal.judge(conv, data.test.take(300)).rate > universal.control().judge(conv, data.test.take(300)).rate

# %% [markdown]
# ## A patch to print
#
# A patch (Brown et al. 2017, arXiv:1712.09665) may look like anything, and works wherever it lies. What covers a
# part of a digit fools by that alone, so the control is a patch of noise at the same places.

# %%
size, goal = 9 if mnist else 4, 3
patch = sparring.fit_patch(conv, data.train.take(500), size, target=goal, steps=300)
fitted, control = (made.judge(conv, data.test.take(300)).rate for made in (patch, patch.control()))
print(f"read as {goal}: {pictures.share(fitted)} with the patch, {pictures.share(control)} with noise instead")
held_up, _ = patch.apply(few.x, few.ids)
pictures.strips(
    Strip("the patch", patch.patch[None]),
    Strip("held up", held_up, [str(label) for label in conv(held_up).argmax(1).tolist()], colour=pictures.ORANGE),
)
assert fitted > control
