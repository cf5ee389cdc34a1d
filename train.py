"""
Train a GPT for the arena's fixed wall-clock budget and have it scored. The only file an experiment edits.

    uv run train.py                                 an NVIDIA GPU: bfloat16, compiled
    AUTORESEARCH_ARENA=demo uv run train.py         any CPU: float32, a small model

It is written for GPUs of compute capability 8.0 or newer with 8 GB or more, and has not been run on one yet. One file,
top to bottom: constants, attention, model, optimizers, training. prepare.py owns the data, the clock and the score.
"""

import gc
import os
import textwrap
import time
from collections import deque
from functools import cache

if "microsoft" not in os.uname().release.lower():     # under WSL2 it fails on some cards (pytorch issue 192330)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")    # torch reads it when it is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.card import find_attention, find_device, suited
from prepare import ARENA, TrainLoader, finish

DEVICE = find_device(ARENA)     # "cuda", and "cpu" for the demo
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
if DEVICE == "cuda":
    from torch.nn.attention.varlen import varlen_attn  # seconds to import, and of no use to a CPU


def pick(cpu, gpu):
    return cpu if DEVICE == "cpu" else gpu


@cache
def compiled(function):
    return function if DEVICE == "cpu" else torch.compile(function, dynamic=False)


# -----------------------------------------------------------------------------
# Constants, to be edited in place; docs/notebook.md says where they come from. [a, b] is the range that the offline agent
# searches. `pick` has the value for a CPU, then for a GPU. Rates "at width 768" are used times (WIDTH / 768) ** -0.5.

GPU = suited(ARENA, DEVICE)     # what suits the card; a number in the place of one overrules it
DEPTH         = pick(2, GPU[0])         # [1, 16] layers
HEADS         = pick(2, GPU[1])         # [1, 16] attention heads in a layer
HEAD_DIM      = pick(48, 128)           # width of a head; the model's is HEADS * HEAD_DIM
BATCH         = pick(2**12, GPU[2])     # [2**10, 2**20] tokens in an optimizer step
MICRO_BATCH   = 2**17                   # tokens in a forward pass at most; halved if memory is short
TABLE_ROWS    = pick(64, GPU[3])        # [1, 256] rows of an n-gram table, over the vocabulary
ROPE_BASE     = pick(1e4, 1e6)          # [1e3, 1e7] base of the rotary wavelengths
WINDOWS       = "SSSLSL"    # one letter a layer, repeated: L sees the whole row, S a part of it; the last layer is L
SHORT_WINDOW  = 0.25        # [0.05, 1.0] reach of an S layer, as a share of the row
DOCUMENT_MASK = True        # whether attention stays within a document
MAX_DOCUMENTS = 16          # documents of a row that attention tells apart; the last holds the rest
MLP_RATIO     = 4           # [1, 8] hidden width of the MLP over the model's width
MLP_SHIFT     = 0.5         # [0.0, 1.0] the MLP squares what exceeds this
QK_SCALE      = 1.1         # [0.5, 2.0] length of queries and keys, over that of a normed vector
KEY_SHIFT     = 0.5         # [0.0, 1.0] share of a key's channels from the token before, in L layers (modded-nanogpt, pull request 169)
SOFTCAP       = 16.5        # [5.0, 50.0] logits end at plus or minus this
SOFTCAP_KNEE  = 15.0        # [5.0, 50.0] where they begin to bend
NGRAMS        = (2, 3)      # lengths of the n-grams that have hashed value embeddings; () for none
GATE_CHANNELS = 32          # channels of the residual stream that gate the value embeddings
SKIP_INIT     = 0.1         # [0.0, 0.5] weight of the token embedding in each layer's input at the start

EMBEDDING_LR  = 0.6         # [0.05, 3.0] AdamW, token and value embeddings, at width 768
HEAD_LR       = 0.004       # [0.0005, 0.05] AdamW, output head, at width 768
RESIDUAL_LR   = 0.008       # [0.001, 0.1] AdamW, weights of the residual stream
SKIP_LR       = 0.8         # [0.05, 3.0] AdamW, weights of the token embedding in the layers
ADAM_BETA1    = 0.8         # [0.5, 0.95] first moment of AdamW
SKIP_BETA1    = 0.96        # [0.5, 0.99] the same, for the weights of the token embedding
ADAM_BETA2    = 0.95        # [0.8, 0.999] second moment of AdamW
ADAM_WARMDOWN = 0.65        # [0.05, 1.0] share of the budget over which AdamW's rates fall
TABLE_LR      = 0.6         # [0.05, 3.0] RMSProp, n-gram tables, at width 768; does not fall
TABLE_BETA2   = 0.999       # [0.9, 0.9999] its second moment, one for each row
MATRIX_LR     = 0.03        # [0.005, 0.2] Muon, every matrix inside a layer
MOMENTUM      = 0.95        # [0.8, 0.99] Muon, after its warm-up
MOMENTUM_STEPS = 300        # [10, 1000] steps over which the momentum rises from 0.85
MUON_BETA2    = 0.95        # [0.8, 0.999] second moment of Muon, one for each neuron
WEIGHT_DECAY  = 0.1         # [0.0, 1.0] Muon, fades to 0 with the budget
WARMDOWN      = 0.95        # [0.05, 1.0] share of the budget over which Muon's rate falls
FINAL_LR      = 0.05        # [0.0, 0.3] where the falling rates end, as a share of the start
LOSS_CHUNK    = 2**15       # tokens whose logits are in memory at once
MEMORY_SHARE  = 0.85        # of the GPU's memory that training may take; MICRO_BATCH is halved until that is enough
WIDTH = HEADS * HEAD_DIM
T, V = ARENA.sequence_len, ARENA.vocab_size

# -----------------------------------------------------------------------------
# Attention: causal, within documents, over a window. On a CPU by a dense mask, on a GPU by flash attention's kernels,
# which skip what the window and the documents hide.

ATTENTION = find_attention(DEVICE)      # "dense", "varlen" or "varlen, FA3"


def document_numbers(x):
    """Which document of its row each token belongs to, (B, T), from 0 to below MAX_DOCUMENTS."""
    first = x[:, 1:] == ARENA.bos if DOCUMENT_MASK else torch.zeros_like(x[:, 1:], dtype=torch.bool)
    return F.pad(first.cumsum(1).clamp(max=MAX_DOCUMENTS - 1), (1, 0))


def document_mask(x, window):
    """Bool (B, 1, T, T): a query sees no later key, none beyond the window, none of another document."""
    document = document_numbers(x)
    back = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
    return ((back >= 0) & (back <= window) & (document[:, :, None] == document[:, None, :]))[:, None]


def document_offsets(x):
    """Starts of the documents in the flattened batch, int32 (B * slots + 1,); spare slots are empty, at their row's end."""
    slots = MAX_DOCUMENTS if DOCUMENT_MASK else 1
    rows = torch.arange(len(x), device=x.device)[:, None]
    slot = document_numbers(x) + rows * slots
    offsets = ((rows + 1) * T).expand(-1, slots).flatten()
    offsets = offsets.scatter_reduce(0, slot.flatten(), torch.arange(x.numel(), device=x.device), "amin")
    return F.pad(offsets, (0, 1), value=x.numel()).int()


def documents_of(x, windows):
    """What attention has to know of the documents in x: their offsets, or on a CPU a mask for each window."""
    return {window: document_mask(x, window) for window in windows} if ATTENTION == "dense" else document_offsets(x)


def attend(q, k, v, documents, window):
    """Attention of q over k and v, each (B, T, HEADS, HEAD_DIM), in `documents_of`. In here layouts differ by device."""
    if ATTENTION == "dense":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents[window]).transpose(1, 2)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*flat, documents, documents, T, T, window_size=(window, 0)).view_as(q)


# -----------------------------------------------------------------------------
# Model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def linear(x, weight):
    """Weights are kept in float32, and all products are in DTYPE."""
    return F.linear(x.to(DTYPE), weight.to(DTYPE))


def rotary():
    """Cosines and signed sines of the rotary embedding (arXiv 2104.09864), (2, T, 1, HEAD_DIM)."""
    wavelengths = ROPE_BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(T)[:, None] / wavelengths)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)))


def rotate(x, cos, sin):
    """Turn the pairs of channels i and i + HEAD_DIM / 2 of x (B, T, HEADS, HEAD_DIM) by the angles of their token."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)     # one copy fewer than chunk and cat
    return (x * cos + swapped * sin).to(x.dtype)


class NgramTables(nn.Module):
    """Value embeddings of the n-grams that end at each token, for some layers: rows of tables, found by hashing.

    Every n in NGRAMS has two tables of half the width in each layer: two n-grams which share a row in one do not in the
    other. One tensor holds all. Autograd does not see it: a step touches few rows, whose gradient is all that it needs.
    """

    def __init__(self, layers):
        super().__init__()
        self.shape = (layers, len(NGRAMS), WIDTH)
        tables, self.rows = layers * len(NGRAMS) * 2, TABLE_ROWS * V
        # products of a token and a factor stay below 2**63, and their high bits are well mixed
        factors = torch.randint(2**40, (layers, len(NGRAMS), 2, max(NGRAMS, default=1)),
                                generator=torch.Generator().manual_seed(0)) | 1
        for i, n in enumerate(NGRAMS):
            factors[:, i, :, n:] = 0
        self.register_buffer("factors", factors.flatten(0, 2), persistent=False)
        self.register_buffer("offsets", torch.arange(tables) * self.rows, persistent=False)
        weight = torch.empty(tables * self.rows, WIDTH // 2, dtype=DTYPE, device=DEVICE)    # too large to copy there
        self.weight = nn.Parameter(weight, requires_grad=False)

    def find(self, x):
        """Rows of the n-grams that end at tokens x (B, T), none of which crosses a document: (B, T, tables)."""
        ngram = [x]
        while len(ngram) < self.factors.size(1):
            before = F.pad(ngram[-1][:, :-1], (1, 0), value=ARENA.bos)
            ngram.append(torch.where(ngram[-1] == ARENA.bos, ARENA.bos, before))
        hashed = sum(token[..., None] * factor for token, factor in zip(ngram, self.factors.unbind(1), strict=True))
        return (hashed >> 20) % self.rows + self.offsets    # low bits come of the factors' low bits alone

    def forward(self, index):
        """The rows themselves, (B, T, layers, len(NGRAMS), WIDTH)."""
        return F.embedding(index, self.weight).view(*index.shape[:2], *self.shape)


class Layer(nn.Module):
    def __init__(self, window, sources):
        super().__init__()
        self.window = window
        self.qkv = nn.Parameter(torch.empty(3, WIDTH, WIDTH))
        self.out = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.gate = nn.Parameter(torch.empty(sources * HEADS, GATE_CHANNELS)) if sources else None
        self.up = nn.Parameter(torch.empty(MLP_RATIO * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.empty(WIDTH, MLP_RATIO * WIDTH))

    def forward(self, h, extra, rope, documents, later):
        """The residual stream h (B, T, WIDTH) behind this layer. `extra` are value embeddings, each (B, T, WIDTH); `later`
        (B, T, 1, 1) is false where a document begins."""
        h = h + self.attention(norm(h), extra, rope, documents, later)
        return h + self.mlp(norm(h))

    def attention(self, x, extra, rope, documents, later):
        q, k, v = linear(x, self.qkv.flatten(0, 1)).view(*x.shape[:2], 3, HEADS, HEAD_DIM).unbind(2)
        if self.gate is not None:   # value residual (arXiv 2410.17897), from embeddings, gated for each head
            gate = 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS], self.gate)).view(*x.shape[:2], -1, HEADS, 1)
            for i, source in enumerate(extra):
                v = v + gate[:, :, i] * source.view_as(v)
        if self.window == T:        # a long window finds what followed the same token before, without a second layer
            slow = torch.arange(HEAD_DIM, device=x.device) % (HEAD_DIM // 2) >= (1 - KEY_SHIFT) * HEAD_DIM // 2
            k = torch.where(slow & later, F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k)
        q, k = (QK_SCALE * norm(rotate(t, *rope)) for t in (q, k))
        return linear(attend(q, k, v, documents, self.window).reshape_as(x), self.out)

    def mlp(self, x):
        return linear(F.relu(linear(x, self.up) - MLP_SHIFT).square(), self.down)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        letters = (WINDOWS * DEPTH)[: DEPTH - 1] + "L"
        # not -1 for L: a window as long as the row keeps every layer on one attention kernel
        self.windows = [T if letter == "L" else max(int(T * SHORT_WINDOW), 1) for letter in letters]
        self.valued = list(range((DEPTH - 1) % 2, DEPTH, 2))    # with value embeddings: every second, and the last
        self.embed = nn.Parameter(torch.empty(V, WIDTH))
        self.values = nn.Parameter(torch.empty(V, len(self.valued) * WIDTH))
        self.tables = NgramTables(len(self.valued))
        sources = [(1 + len(NGRAMS)) * (i in self.valued) for i in range(DEPTH)]
        self.layers = nn.ModuleList(map(Layer, self.windows, sources))
        self.residual = nn.Parameter(torch.empty(DEPTH))    # weight of the stream in each layer's input
        self.skip = nn.Parameter(torch.empty(DEPTH))        # weight of the token embedding there
        self.head = nn.Parameter(torch.empty(V, WIDTH))
        self.register_buffer("rope", rotary(), persistent=False)
        self.to(DEVICE)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Start from the seed: unit embeddings, uniform matrices of variance 1 / width, silent output projections. All
        parameters are set here and nowhere else, since the warm-up changes them first."""
        torch.manual_seed(ARENA.seed)
        for parameter in self.parameters():
            parameter.fill_(torch.nan)
        bound = (3 / WIDTH) ** 0.5
        nn.init.normal_(self.embed)
        nn.init.normal_(self.head, std=0.001)
        nn.init.ones_(self.residual)
        nn.init.constant_(self.skip, SKIP_INIT)
        inputs = [*(layer.qkv for layer in self.layers), *(layer.up for layer in self.layers)]
        for weight in (self.values, self.tables.weight, *inputs):
            nn.init.uniform_(weight, -bound, bound)
        for layer in self.layers:
            for weight in (layer.out, layer.down, *([] if layer.gate is None else [layer.gate])):
                nn.init.zeros_(weight)
        left_out = [name for name, parameter in self.named_parameters() if parameter.flatten()[:1].isnan().any()]
        assert not left_out, f"initialize() leaves out {', '.join(left_out)}"

    def hidden(self, x, ngrams):
        """Last state of the residual stream, normed, (B, T, WIDTH), of tokens x and what the tables hold for them."""
        documents, later = documents_of(x, {*self.windows}), (x != ARENA.bos)[..., None, None]
        h = start = norm(F.embedding(x, self.embed)).to(DTYPE)
        values = F.embedding(x, self.values).to(DTYPE).view(*x.shape, len(self.valued), WIDTH).unbind(2)
        sources = zip(self.valued, values, ngrams.unbind(2), strict=True)
        extras = {i: (value, *ngram.unbind(2)) for i, value, ngram in sources}
        for i, layer in enumerate(self.layers):
            # with start.float() its gradient would be summed over the layers in float32
            h = torch.addcmul(self.residual[i] * h.float(), self.skip[i], start).to(DTYPE)
            h = layer(h, extras.get(i), self.rope, documents, later)
        return norm(h)

    def logits(self, h):
        """Logits (..., V), float32, of last states h (..., WIDTH): these are trained, and these are scored."""
        return SOFTCAP * torch.tanh(linear(h, self.head).float() / SOFTCAP_KNEE)

    def forward(self, x):
        """Logits (B, T, V) of tokens x (B, T)."""
        return self.logits(self.hidden(x, self.tables(self.tables.find(x))))

    def loss(self, h, y):
        """Summed cross-entropy of targets y (N,) after states h (N, WIDTH); what is added must be a sum over N too."""
        return F.cross_entropy(self.logits(h), y, reduction="sum")


def flops_per_token(model):
    """Of a token, forward and backward, as PaLM counts them (arXiv 2204.02311, appendix B), with keys that are hidden."""
    return 6 * sum(p.numel() for p in (*model.layers.parameters(), model.head)) + 12 * WIDTH * sum(model.windows)


# -----------------------------------------------------------------------------
# Optimizers: Muon for the matrices inside the layers, RMSProp for the n-gram tables, AdamW for everything else.
# Scalars that change reach the compiled functions as 0-D tensors, so that one graph serves all steps.

# Polar Express (arXiv 2505.16932): five odd polynomials that together send every singular value close to 1
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(matrices):
    """Nearest semi-orthogonal matrices to a stack (N, rows, columns) of tall ones."""
    x = matrices.mT.to(DTYPE)
    # the polynomials need singular values of at most 1, and in bfloat16 the norm may come out short: a margin
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT


def muon_update(weights, grads, momenta, squares, lr, momentum, decay):
    """Step a stack (N, rows, columns) of tall matrices in place; `lr` has one rate for each."""
    momenta.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momenta, momentum)).float()
    # NorMuon (arXiv 2510.05491): even out the rows, which differ in length where there are more of them than columns,
    # and keep the size of the whole; a factor that all share is lost in that, so the moment needs no bias correction
    size = update.norm(dim=(1, 2), keepdim=True)
    squares.lerp_(update.square().mean(2, keepdim=True), 1 - MUON_BETA2)
    update = update / (squares.sqrt() + 1e-10)
    update = update * (size / (update.norm(dim=(1, 2), keepdim=True) + 1e-10))
    cautious = (update * weights) > 0       # decay only where the step shrinks the weight too (arXiv 2510.12402)
    weights.sub_(lr * (update + decay * weights * cautious))


def adamw_update(weight, grad, mean, square, lr, beta1, step):
    """Step one tensor in place (arXiv 1711.05101, without decay)."""
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad.square(), 1 - ADAM_BETA2)
    spread = (square / (1 - ADAM_BETA2**step)).sqrt()
    weight.sub_(lr * mean / (1 - beta1**step) / (spread + 1e-10))


def table_update(weight, square, index, grad, lr, step):
    """Step the rows of `weight` (R, C) that `index` (N,) names, by the gradient (N, C) of what was looked up there.

    RMSProp without momentum, one second moment for each row (R,), in float32. The gradients of a row that occurs more
    than once are added up. A kernel does it at once on a GPU; for another rule, leave it out and change the lines below."""
    square.mul_(TABLE_BETA2)
    correction, share = 1 - TABLE_BETA2**step, 1 - TABLE_BETA2
    if DEVICE == "cuda":
        from gpt.kernels import row_rmsprop  # seconds to import, too
        row_rmsprop(weight, square, index, grad, lr, correction, share)
        return
    rows, place = index.unique(return_inverse=True)
    total = grad.new_zeros(len(rows), grad.size(1), dtype=torch.float32).index_add_(0, place, grad.float())
    square[rows] += share * total.square().mean(1)
    spread = (square[rows] / correction).sqrt() + 1e-10
    weight[rows] = (weight[rows].float() - lr * total / spread[:, None]).to(weight.dtype)


def upright(x):
    """A matrix, or a stack of some, as a stack of tall ones; a view."""
    x = x.view(-1, *x.shape[-2:])
    return x if x.size(1) >= x.size(2) else x.mT


class Muon:
    """Momentum, orthogonalized (Keller Jordan, Muon): matrices of one shape, wide ones set upright, as one stack."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.start_lr, self.warmdown = parameters, lr, lr, WARMDOWN
        self.momentum, self.decay = MOMENTUM, WEIGHT_DECAY
        self.matrices = [upright(p) for p in parameters]
        # with more outputs than inputs a step is spread: each output should move as far as those of a square matrix
        spread = [max(p.size(-2) / p.size(-1), 1.0) ** 0.5 for p in parameters]
        self.spread = torch.cat([m.new_full((len(m), 1, 1), s) for m, s in zip(self.matrices, spread, strict=True)])
        self.momenta = torch.zeros_like(torch.cat(self.matrices))
        self.squares = torch.zeros_like(self.momenta[..., :1])

    @torch.no_grad()
    def step(self):
        weights, grads = torch.cat(self.matrices), torch.cat([upright(p.grad) for p in self.parameters])
        scalars = torch.tensor(self.momentum), torch.tensor(self.decay)
        compiled(muon_update)(weights, grads, self.momenta, self.squares, self.lr * self.spread, *scalars)
        torch._foreach_copy_(self.matrices, weights.split([len(m) for m in self.matrices]))


class AdamW:
    """Tensors that share a rate."""

    def __init__(self, parameters, lr, beta1=ADAM_BETA1):
        self.parameters, self.lr, self.start_lr, self.warmdown = parameters, lr, lr, ADAM_WARMDOWN
        self.beta1, self.steps = beta1, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        scalars = [torch.tensor(scalar) for scalar in (self.lr, self.beta1, float(self.steps))]
        for p, (mean, square) in zip(self.parameters, self.moments, strict=True):
            compiled(adamw_update)(p, p.grad, mean, square, *scalars)


class RowRMSProp:
    """The n-gram tables."""

    def __init__(self, tables, lr):
        self.parameters, self.lr, self.start_lr, self.warmdown, self.steps = [tables.weight], lr, lr, 0.0, 0
        self.square = torch.zeros(len(tables.weight), device=DEVICE)

    @torch.no_grad()
    def step(self, rows, grad):
        """`rows` is what was looked up, (B, T, tables), and `grad` has the gradient of each."""
        self.steps += 1
        table_update(*self.parameters, self.square, rows.flatten(), grad.reshape(-1, WIDTH // 2), self.lr, self.steps)


def make_optimizers(model):
    """That of the tables, then those of all other parameters; the last takes what no other does, such as a new gain."""
    scale = (WIDTH / 768) ** -0.5       # the rates were tuned at width 768
    matrices = [p for p in model.layers.parameters() if p.dim() > 1 and min(p.shape[-2:]) > 1]
    shapes = sorted({upright(p).shape[1:] for p in matrices})
    optimizers = [
        RowRMSProp(model.tables, TABLE_LR * scale),
        AdamW([model.embed, model.values], EMBEDDING_LR * scale),
        AdamW([model.head], HEAD_LR * scale),
        AdamW([model.skip], SKIP_LR, SKIP_BETA1),
        *(Muon([p for p in matrices if upright(p).shape[1:] == shape], MATRIX_LR) for shape in shapes),
    ]
    taken = [id(p) for optimizer in optimizers for p in optimizer.parameters]
    assert len(taken) == len({*taken}), "two optimizers step one parameter"
    return [*optimizers, AdamW([p for p in model.parameters() if p.requires_grad and id(p) not in taken], RESIDUAL_LR)]


def schedule(optimizers, step, progress):
    """Set what changes in the course of the budget."""
    for optimizer in optimizers:
        falling = min(1.0, (1 - progress) / optimizer.warmdown) if optimizer.warmdown else 1.0
        optimizer.lr = optimizer.start_lr * (falling + (1 - falling) * FINAL_LR)
        if isinstance(optimizer, Muon):
            optimizer.momentum = 0.85 + (MOMENTUM - 0.85) * min(step / MOMENTUM_STEPS, 1.0)
            optimizer.decay = WEIGHT_DECAY * (1 - progress)


# -----------------------------------------------------------------------------
# Training

LAG = 0 if DEVICE == "cpu" else 2     # steps until a loss is on the host: the loader lets the CPU run that far ahead


def head_loss(model, h, y, tokens):
    """Loss of targets y (N,) after states h (N, WIDTH), as a share of the mean over so many tokens, and its gradient in
    h; those of parameters are left at them. Few logits are in memory: LOSS_CHUNK at a time, forward and backward."""
    weight = torch.full((), 1 / tokens, device=DEVICE)
    parts, total = [part.detach().requires_grad_() for part in h.split(LOSS_CHUNK)], 0.0
    for part, target in zip(parts, y.split(LOSS_CHUNK), strict=True):
        loss = compiled(model.loss)(part, target)
        loss.backward(weight)
        total += loss.detach()
    return total * weight, torch.cat([part.grad for part in parts])


def train_step(model, optimizers, x, y, micro_rows):
    """One optimizer step on x and y (rows, T), some rows at a time. Returns the mean loss, still on the device."""
    rows = compiled(model.tables.find)(x)
    total, grads = 0.0, []
    for tokens, targets, some in zip(*(tensor.split(micro_rows) for tensor in (x, y, rows)), strict=True):
        ngrams = model.tables(some).requires_grad_()
        h = compiled(model.hidden)(tokens, ngrams).flatten(0, 1)
        loss, grad = head_loss(model, h, targets.flatten(), x.numel())
        h.backward(grad)
        total += loss
        grads.append(ngrams.grad if NGRAMS else ngrams.detach())    # without n-grams empty, and of no part in the loss
    optimizers[0].step(rows, grads[0] if len(grads) == 1 else torch.cat(grads))
    for optimizer in optimizers[1:]:
        optimizer.step()
    model.zero_grad()
    return total


def warm_up(model, micro_rows):
    """Run everything once on random tokens, which on a GPU compiles it, then start again from the seed. Returns the rows
    of a micro-batch that memory allows: they are halved until a step fits."""
    rows, optimizers = BATCH // T, make_optimizers(model)
    while True:
        tokens = torch.randint(V, (max(rows, ARENA.eval_rows), T), device=DEVICE)
        try:
            train_step(model, optimizers, tokens[:rows], tokens[:rows], micro_rows)
            break
        except torch.OutOfMemoryError:
            if micro_rows == 1:
                raise
        model.zero_grad()       # outside of `except`, whose traceback holds what the step allocated
        gc.collect()
        torch.cuda.empty_cache()
        micro_rows //= 2
        print(f"out of memory: {micro_rows} rows at a time now", flush=True)
    with torch.no_grad():
        compiled(model.eval())(tokens[: ARENA.eval_rows])   # as `finish` will call it, beside the optimizers' state
    model.train()
    model.initialize()
    return micro_rows


def check_constants():
    """AssertionError for what would fail later and less clearly, or not at all."""
    assert HEAD_DIM % 8 == 0 and HEAD_DIM <= 256, "HEAD_DIM must be a multiple of 8 up to 256, as attention kernels need"
    assert BATCH % T == MICRO_BATCH % T == 0, f"BATCH and MICRO_BATCH must be multiples of {T}, the tokens in a row"
    assert BATCH % min(BATCH, MICRO_BATCH) == 0, "MICRO_BATCH must divide BATCH"
    assert type(NGRAMS) is tuple and all(n > 0 for n in NGRAMS), "NGRAMS must be a tuple, as in (2, 3), (2,) or ()"
    assert WINDOWS and set(WINDOWS) <= set("SL"), "WINDOWS must be letters S and L, at least one"


def train(model, optimizers, loader, micro_rows):
    """Train until the loader's time is up."""
    losses, smooth, flops = deque(maxlen=LAG + 1), 0.0, flops_per_token(model)
    for step, (x, y) in enumerate(loader):
        schedule(optimizers, step, loader.progress)
        losses.append(train_step(model, optimizers, x, y, micro_rows).to("cpu", non_blocking=True))
        if step >= LAG:
            if not losses[0] < 100:     # worded so that NaN fails: a run that is lost should not cost five minutes
                raise SystemExit(f"error: the loss diverged: {float(losses[0])}")
            smooth += (float(losses[0]) - smooth) * max(0.1, 1 / (step - LAG + 1))
            if step % 10 == 0:
                loader.report(step, smooth, flops)


def main():
    check_constants()
    torch.set_float32_matmul_precision("high")
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
    loader = TrainLoader(BATCH // T, DEVICE)    # which tells when the arena is missing; no batch yet, and no clock
    constants = [f"{name}={value}" for name, value in globals().items()
                 if name.isupper() and isinstance(value, int | float | str | tuple)]
    print(textwrap.fill("  ".join(constants), 120), flush=True)
    start = time.perf_counter()
    model = GPT()
    micro_rows = warm_up(model, min(BATCH, MICRO_BATCH) // T)
    loader.register(compiled(model))    # what will be scored: its graph leaves before the first batch
    optimizers, compile_seconds = make_optimizers(model), time.perf_counter() - start
    size, tables = sum(p.numel() for p in model.parameters()), model.tables.weight.numel()
    print(f"{size:,} parameters, {tables:,} of them in n-gram tables; attention {ATTENTION}; "
          f"{BATCH // T} rows a step, {micro_rows} at a time; warmed up in {compile_seconds:.1f} s", flush=True)
    gc.collect()
    gc.disable()    # a collection in the middle of the run would stall it
    train(model, optimizers, loader, micro_rows)
    finish(compiled(model), loader, depth=DEPTH, flops_per_token=flops_per_token(model), attention=ATTENTION,
           micro_batch=micro_rows * T, compile_seconds=f"{compile_seconds:.1f}")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: {str(error).partition('. ')[0]}: lower DEPTH, HEADS or TABLE_ROWS") from None
