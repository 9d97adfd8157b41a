# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 1. Train
#
# **What you will see.** Handwritten digits; a network of dense layers that learns to read them in 2,000 steps; one
# with convolutions that reads them better; how both learn, step by step; and the digits that they still get wrong.
# Chapter 2 fools such networks.
#
# The data is MNIST (LeCun, Cortes, Burges 1998) where it is at hand, else the 1,797 smaller digits that come with
# scikit-learn. MNIST is what the figures in the text speak of.

# %%
import sparring  # before torch: see docs/decisions/003

# isort: split
import importlib.util

import pictures
from IPython.display import display
from pictures import share

from sparring.data import available

data = sparring.load("mnist" if available("mnist") else "digits")
shape = tuple(data.train.x.shape[1:])
print(f"{data.name}: {len(data.train):,} images to train on, {len(data.test):,} to test on, each {shape}, in [0, 1]")

# %%
pictures.tiles(data.train.x[:16], [str(label) for label in data.train.y[:16].tolist()], "Training images and labels")

# %% [markdown]
# ## A dense network
#
# A network is a function $z = f_\theta(x)$ from an image to ten numbers, one a class, called *logits*. The softmax
# turns them into probabilities, $y(x)_i = e^{z_i} / \sum_j e^{z_j}$. Training looks for weights $\theta$ that make
# the probability of the true label large, that is, the *cross-entropy* small:
#
# $$ \min_\theta \; \sum_{(x,\, t)} -\log y_\theta(x)_t $$
#
# It does so by small steps against the gradient with respect to $\theta$, each on 128 images (Adam: Kingma and Ba
# 2015, arXiv:1412.6980). This net has two hidden layers of 300 and 100 units (LeCun et al. 1998).
#
# Loss and accuracy are those on the **test** images, which the net never learns from; the loss is summed over them.

# %%
dense = sparring.train("dense", data, steps=2000)
display(dense)
for line in dense.card["log"]:
    print(f"Step: {line['step']}, Loss: {line['loss']:.6f}, Accuracy: {line['accuracy']:.4f}")

# %% [markdown]
# ## A network with convolutions
#
# A dense layer does not know which pixels are neighbours. A convolution looks at a small window and uses the same
# weights everywhere, so a stroke is a stroke wherever it stands. Two of them, then 100 units (Wong and Kolter 2018,
# arXiv:1711.00851), have fewer weights and read better: over 99 % on MNIST.

# %%
conv = sparring.train("conv", data, steps=2345 if data.name == "mnist" else 500)
display(conv)
for checkpoint in (dense, conv):
    card = checkpoint.card
    print(f"{card['net']}: {card['parameters']:,} weights, {share(card['accuracy'], 2)} of the test images right")

# %% [markdown]
# ## How they learn
#
# On MNIST the grey line is the run that this project started from, a dense net that reached 97.06 % at step 2,000:
# the bar to pass. On the small digits the loss soon turns up again while the accuracy stands: with so few images
# the net grows ever surer, of its mistakes too.

# %%
BAR = [0.9067, 0.9280, 0.9419, 0.9394, 0.9455, 0.9561, 0.9606, 0.9636, 0.9647, 0.9619]
BAR += [0.9655, 0.9647, 0.9619, 0.9668, 0.9694, 0.9666, 0.9722, 0.9709, 0.9679, 0.9706]

left, right = pictures.charts(2)
for checkpoint, colour, marker in ((dense, pictures.BLUE, "o"), (conv, pictures.ORANGE, "s")):
    log, name = checkpoint.card["log"], checkpoint.card["net"]
    steps = [line["step"] for line in log]
    left.plot(steps, [line["accuracy"] for line in log], color=colour, marker=marker, markevery=3, label=name)
    mean = [line["loss"] / len(data.test) for line in log]
    right.plot(steps, mean, color=colour, marker=marker, markevery=3, label=name)
if data.name == "mnist":
    left.plot(range(100, 2001, 100), BAR, color=pictures.GREY, linestyle="--", label="the original run, dense")
left.set(title="Test accuracy", xlabel="step")
pictures.percent(left)
right.set(title="Test loss, mean of an image", xlabel="step")
pictures.logarithmic(right)
left.legend(loc="lower right")
right.legend()
pictures.plt.show()

# %%
if data.name == "mnist":
    assert dense.card["accuracy"] > 0.9706, "the dense net must pass the bar"
    assert conv.card["accuracy"] > 0.99, "the convolutions must pass 99 %"

# %% [markdown]
# ## What they get right, and what not
#
# Each tile is captioned *prediction / actual*. Some of the wrong ones a person would doubt too. Remember how sure
# the net is of them: a softmax says little about what the net does not know.

# %%
sure, labels = conv.net(data.test.x).softmax(1).max(1)
correct = labels == data.test.y
accuracy = correct.double().mean().item()
captions = [f"{said}/{actual}" for said, actual in zip(labels.tolist(), data.test.y.tolist(), strict=True)]

some = correct.nonzero().squeeze(1)[:16].tolist()
pictures.tiles(
    data.test.x[some], [captions[row] for row in some], f"Right: {share(accuracy, 2)} of all", pictures.BLUE
)
some = (~correct).nonzero().squeeze(1)[:16].tolist()
wrong = [f"{captions[row]}\n{share(sure[row].item(), 0)} sure" for row in some]
pictures.tiles(data.test.x[some], wrong, f"Wrong: {share(1 - accuracy, 2)} of all", pictures.ORANGE)

# %% [markdown]
# ## The same in TensorFlow
#
# Nothing here hangs on PyTorch. With `framework="tensorflow"` the same settings train a Keras model, and all that
# follows takes it as it is. (This cell says so and goes on where TensorFlow is not installed.)

# %%
if importlib.util.find_spec("tensorflow"):
    keras = sparring.train("dense", data, steps=500, framework="tensorflow")
    found = sparring.attack(keras.net, data.test.x[:100], data.test.y[:100], "fgsm", sparring.Linf(0.1))
    print(f"{type(keras.net).__module__.split('.')[0]}: {share(keras.card['accuracy'], 2)} of the test images right")
    print(f"of the first 100: {(~found.clean).sum()} when untouched, and {(~found.found).sum()} under attack")
else:
    print("not installed: pip install 'sparring[tensorflow]'")

# %% [markdown]
# That last figure is what the next chapter is about.
