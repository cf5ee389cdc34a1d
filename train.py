"""
Train a GPT for the arena's fixed wall-clock budget and have it scored. The only file an experiment edits.

    uv run train.py                                 an NVIDIA GPU: bfloat16, compiled
    AUTORESEARCH_ARENA=demo uv run train.py         any CPU: float32, a small model

loop.py makes the arena that it needs, and so does `uv run prepare.py --arena NAME`. It is written for GPUs of compute
capability 8.0 or newer with 8 GB or more, and has not been run on one yet.

One file, top to bottom: constants, attention, model, loss, optimizers, training. prepare.py owns the data, the clock
and the score.
"""

import gc
import os
import textwrap
import time
from collections import deque

if "microsoft" not in os.uname().release.lower():     # under WSL2 it fails on some cards (pytorch issue 192330)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")    # torch reads it when it is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import ARENA, TrainLoader, finish

DEVICE = "cuda" if torch.cuda.is_available() and ARENA.name != "demo" else "cpu"    # the demo is sized for a CPU
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
if DEVICE == "cuda":
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn  # seconds to import, and of no use to a CPU


def pick(*by_card):
    """One value for each class of machine: CPU, then GPUs up to 8, 12, 24, 48 and 80 GB or more."""
    if DEVICE == "cpu":
        return by_card[0]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return by_card[1 + sum(memory > limit for limit in (9, 13, 25, 49))]


_compiled = {}


def compiled(function):
    """The function itself on a CPU, its compiled form on a GPU; compiled once."""
    if DEVICE == "cpu":
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


# -----------------------------------------------------------------------------
# Constants, to be edited in place. docs/notebook.md says where each comes from, as far as that is known.
# [a, b] is the range that the offline agent searches. Rates "at width 768" are used times (WIDTH / 768) ** -0.5, and
# stand here and in the log without it.

#                    CPU    8 GB   12 GB  24 GB  48 GB  80 GB
DEPTH         = pick(2,     4,     6,     6,     6,     6)       # [1, 16] layers
HEADS         = pick(2,     2,     3,     4,     4,     5)       # [1, 16] attention heads in a layer
HEAD_DIM      = pick(48,    128,   128,   128,   128,   128)     # width of a head; the model's is HEADS * HEAD_DIM
BATCH         = pick(2**12, 2**15, 2**14, 2**16, 2**17, 2**17)   # [2**10, 2**20] tokens in an optimizer step
MICRO_BATCH   = pick(2**12, 2**14, 2**14, 2**16, 2**17, 2**17)   # tokens in a forward pass; halved if memory is short
TABLE_ROWS    = pick(64,    4,     8,     16,    64,    64)      # [1, 256] rows of an n-gram table, over the vocabulary
ROPE_BASE     = pick(1e4,   1e6,   1e6,   1e6,   1e6,   1e6)     # [1e3, 1e7] base of the rotary wavelengths
WINDOWS       = "SSSLSL"    # one letter a layer, repeated: L sees the whole row, S a part of it; the last layer is L
SHORT_WINDOW  = 0.25        # [0.05, 1.0] reach of an S layer, as a share of the row
DOCUMENT_MASK = True        # whether attention stays within a document
MAX_DOCUMENTS = 16          # documents of a row that attention tells apart; the last holds the rest
MLP_RATIO     = 4           # [1, 8] hidden width of the MLP over the model's width
MLP_SHIFT     = 0.5         # [0.0, 1.0] the MLP squares what exceeds this
QK_SCALE      = 1.1         # [0.5, 2.0] length of queries and keys, over that of a normed vector
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

LOSS_CHUNK    = 2**13       # tokens whose logits are in memory at once
MEMORY_SHARE  = 0.85        # of the GPU's memory that training may take; MICRO_BATCH is halved until that is enough
WIDTH = HEADS * HEAD_DIM
T, V = ARENA.sequence_len, ARENA.vocab_size

# -----------------------------------------------------------------------------
# Attention: causal, within documents, over a window. On a CPU by a dense mask, on a GPU by flash attention's kernels,
# which skip what the window and the documents hide.


def choose_attention():
    """The backend: FlashAttention 3 on a Hopper that has the package, else the kernels that torch brings."""
    if DEVICE == "cpu":
        return "dense"
    if torch.cuda.get_device_capability()[0] == 9:
        try:
            activate_flash_attention_impl("FA3")
            return "varlen, FA3"
        except (ImportError, OSError, RuntimeError):
            pass        # the package flash_attn_interface is not there, or does not fit this torch
    return "varlen"


ATTENTION = choose_attention()


def first_tokens(x):
    """Bool (B, T): where a document begins, or, without DOCUMENT_MASK, a row."""
    first = x == ARENA.bos if DOCUMENT_MASK else torch.zeros_like(x, dtype=torch.bool)
    return torch.cat((torch.ones_like(first[:, :1]), first[:, 1:]), dim=1)


def document_numbers(x):
    """Which document of its row each token belongs to, (B, T), from 0 to below MAX_DOCUMENTS."""
    return (first_tokens(x).cumsum(1) - 1).clamp(max=MAX_DOCUMENTS - 1)


def document_mask(x, window):
    """Bool (B, 1, T, T): a query sees no later key, none beyond the window, none of another document."""
    document = document_numbers(x)
    back = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
    return ((back >= 0) & (back <= window) & (document[:, :, None] == document[:, None, :]))[:, None]


def document_offsets(x):
    """Starts of the documents in the flattened batch, int32 (B * slots + 1,): a fixed length, as compiling needs.

    A slot that a row does not need is empty and lies at the row's end. Kernels start threads for empty ones too.
    """
    slots = MAX_DOCUMENTS if DOCUMENT_MASK else 1
    rows = torch.arange(len(x), device=x.device)[:, None]
    slot = document_numbers(x) + rows * slots
    offsets = ((rows + 1) * T).expand(-1, slots).flatten()
    offsets = offsets.scatter_reduce(0, slot.flatten(), torch.arange(x.numel(), device=x.device), "amin")
    return F.pad(offsets, (0, 1), value=x.numel()).int()


def attend(q, k, v, documents, window):
    """Attention of q over k and v, each (B, T, HEADS, HEAD_DIM). `documents` is what `documents_of` returns."""
    if ATTENTION == "dense":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents[window]).transpose(1, 2)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*flat, documents, documents, T, T, window_size=(window, 0)).view_as(q)


def documents_of(x, windows):
    """What attention has to know of the documents in x: their offsets, or on a CPU a mask for each window."""
    if ATTENTION == "dense":
        return {window: document_mask(x, window) for window in set(windows)}
    return document_offsets(x)


# -----------------------------------------------------------------------------
# Model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def linear(x, weight):
    """Weights are kept in float32 and used in the precision of what they meet."""
    return F.linear(x, weight.to(x.dtype))


def rotary():
    """Cosines and signed sines of the rotary embedding (arXiv 2104.09864), each (T, 1, HEAD_DIM)."""
    wavelengths = ROPE_BASE ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(T)[:, None] / wavelengths)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def rotate(x, cos, sin):
    """Turn the pairs of channels i and i + HEAD_DIM / 2 of x (B, T, HEADS, HEAD_DIM) by the angles of their token."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)     # one copy fewer than chunk and cat
    return (x * cos + swapped * sin).to(x.dtype)


class NgramTables(nn.Module):
    """Value embeddings of the n-grams that end at each token, for some layers: rows of tables, found by hashing.

    Every n in NGRAMS has two tables of half the width in each layer, with hashes of their own, so that two n-grams
    which share a row in one do not in the other. One tensor holds all tables. Autograd does not see it: a step touches
    few of its rows, so the gradient of what was looked up is all that its optimizer needs.
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
        self.found = self.grad = None   # within a step: the rows that were looked up, and their gradient

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


class Attention(nn.Module):
    def __init__(self, window, sources):
        super().__init__()
        self.window = window
        self.qkv = nn.Parameter(torch.empty(3, WIDTH, WIDTH))
        self.out = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.gate = nn.Parameter(torch.empty(sources * HEADS, GATE_CHANNELS)) if sources else None

    def forward(self, x, extra, rope, documents):
        """`extra` are value embeddings, each (B, T, WIDTH): as many as this layer has sources."""
        B = len(x)
        q, k, v = linear(x, self.qkv.flatten(0, 1)).view(B, T, 3, HEADS, HEAD_DIM).unbind(2)
        if self.gate is not None:   # value residual (arXiv 2410.17897), from embeddings, gated for each head
            gate = 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS], self.gate)).view(B, T, -1, HEADS, 1)
            for i, source in enumerate(extra):
                v = v + gate[:, :, i] * source.view(B, T, HEADS, HEAD_DIM)
        q, k = (QK_SCALE * norm(rotate(t, *rope)) for t in (q, k))
        return linear(attend(q, k, v, documents, self.window).reshape(B, T, WIDTH), self.out)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(MLP_RATIO * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.empty(WIDTH, MLP_RATIO * WIDTH))

    def forward(self, x):
        return linear(F.relu(linear(x, self.up) - MLP_SHIFT).square(), self.down)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        letters = (WINDOWS * DEPTH)[: DEPTH - 1] + "L"
        # not -1 for L: a window as long as the row is the same, and keeps every layer on one attention kernel
        self.windows = [T if letter == "L" else max(int(T * SHORT_WINDOW), 1) for letter in letters]
        self.valued = list(range((DEPTH - 1) % 2, DEPTH, 2))    # with value embeddings: every second, and the last
        self.embed = nn.Parameter(torch.empty(V, WIDTH))
        self.values = nn.Parameter(torch.empty(V, len(self.valued) * WIDTH))
        self.tables = NgramTables(len(self.valued))
        sources = 1 + len(NGRAMS)
        self.attentions = nn.ModuleList(Attention(w, sources * (i in self.valued)) for i, w in enumerate(self.windows))
        self.mlps = nn.ModuleList(MLP() for _ in range(DEPTH))
        self.residual = nn.Parameter(torch.empty(DEPTH))    # weight of the stream in each layer's input
        self.skip = nn.Parameter(torch.empty(DEPTH))        # weight of the token embedding there
        self.head = nn.Parameter(torch.empty(V, WIDTH))
        cos, sin = rotary()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.to(DEVICE)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Start from the seed: unit embeddings, uniform matrices of variance 1 / width, silent output projections."""
        torch.manual_seed(ARENA.seed)
        bound = (3 / WIDTH) ** 0.5
        nn.init.normal_(self.embed)
        nn.init.normal_(self.head, std=0.001)
        nn.init.ones_(self.residual)
        nn.init.constant_(self.skip, SKIP_INIT)
        for weight in (self.values, self.tables.weight, *(a.qkv for a in self.attentions), *(m.up for m in self.mlps)):
            nn.init.uniform_(weight, -bound, bound)
        for weight in (*(a.out for a in self.attentions), *(m.down for m in self.mlps)):
            nn.init.zeros_(weight)
        for i in self.valued:
            nn.init.zeros_(self.attentions[i].gate)

    def drop_grads(self):
        """Free all that a step leaves: the tables' share alone is a gigabyte on a large card."""
        self.zero_grad(set_to_none=True)
        self.tables.found = self.tables.grad = None

    def hidden(self, x, ngrams):
        """Last state of the residual stream, normed, (B, T, WIDTH), of tokens x and what the tables hold for them."""
        documents = documents_of(x, self.windows)
        h = start = norm(F.embedding(x, self.embed)).to(DTYPE)
        values = F.embedding(x, self.values).to(DTYPE).view(*x.shape, len(self.valued), WIDTH).unbind(2)
        sources = zip(self.valued, values, ngrams.unbind(2), strict=True)
        extras = {i: (value, *ngram.unbind(2)) for i, value, ngram in sources}
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            h = (self.residual[i] * h.float() + self.skip[i] * start.float()).to(DTYPE)
            h = h + attention(norm(h), extras.get(i), (self.cos, self.sin), documents)
            h = h + mlp(norm(h))
        return norm(h)

    def forward(self, x):
        """Logits (B, T, V), float32, of tokens x (B, T)."""
        logits = linear(self.hidden(x, self.tables(self.tables.find(x))), self.head)
        return SOFTCAP * torch.tanh(logits.float() / SOFTCAP_KNEE)


@torch.no_grad()
def flops_per_token(model, x):
    """What a token of x costs, forward and backward, as a 0-D tensor: 6 for each weight of a matrix product, 12 for
    each key that a query sees, in each channel."""
    matrices = [p for module in (*model.attentions, *model.mlps) for p in module.parameters()] + [model.head]
    here = torch.arange(T, device=x.device)
    back = here - torch.where(first_tokens(x), here, 0).cummax(1).values    # tokens of the document before this one
    keys = sum((back.clamp(max=window) + 1).float().mean() for window in model.windows)
    return 6 * sum(p.numel() for p in matrices) + 12 * WIDTH * keys


# -----------------------------------------------------------------------------
# Loss


def chunk_loss(h, head, y):
    """Summed loss of softcapped logits, its gradient in h (N, WIDTH), and that in the head (V, WIDTH), by hand."""
    bent = torch.tanh(F.linear(h, head).float() / SOFTCAP_KNEE)
    logits = SOFTCAP * bent
    normalizer = logits.logsumexp(1, keepdim=True)
    target = y[:, None]
    grad = (logits - normalizer).exp() - (torch.arange(V, device=y.device) == target).float()
    grad = (grad * (1 - bent * bent) * (SOFTCAP / SOFTCAP_KNEE)).to(h.dtype)
    return (normalizer - logits.gather(1, target)).sum(), grad @ head, grad.mT @ h


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of targets y (N,) after states h (N, WIDTH), with the output head (V, WIDTH).

    The gradients are taken on the way forward, LOSS_CHUNK tokens at a time, so that logits are never kept.
    """

    @staticmethod
    def forward(ctx, h, head, y):
        low, total, grad_head, grads = head.to(h.dtype), 0.0, torch.zeros_like(head), []
        for part, target in zip(h.split(LOSS_CHUNK), y.split(LOSS_CHUNK), strict=True):
            loss, grad, in_head = compiled(chunk_loss)(part, low, target)
            total, grad_head = total + loss, grad_head.add_(in_head)
            grads.append(grad)
        ctx.save_for_backward(torch.cat(grads), grad_head)
        return total / len(y)

    @staticmethod
    def backward(ctx, grad_loss):
        grad, grad_head = ctx.saved_tensors
        scale = grad_loss / len(grad)
        return grad * scale, grad_head * scale, None


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
    """Nearest semi-orthogonal matrices to a stack (N, rows, columns)."""
    x = matrices.to(DTYPE)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    # the polynomials need singular values of at most 1, and in bfloat16 the norm may come out short: a margin
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def uneven(matrices):
    """Of semi-orthogonal matrices (N, rows, columns), the dimension to average over: the rows of tall ones differ in
    length, and the columns of wide ones."""
    return 2 if matrices.size(1) >= matrices.size(2) else 1


def muon_update(weights, grads, momenta, squares, lr, momentum, decay):
    """Step a stack (N, rows, columns) in place."""
    momenta.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momenta, momentum)).float()
    # NorMuon (arXiv 2510.05491): even out the vectors along the longer side, whose lengths differ, and keep
    # the size of the whole; a factor that all share is lost in that, so the moment needs no bias correction
    size = update.norm(dim=(1, 2), keepdim=True)
    squares.lerp_(update.square().mean(uneven(update), keepdim=True), 1 - MUON_BETA2)
    update = update / (squares.sqrt() + 1e-10)
    update = update * (size / (update.norm(dim=(1, 2), keepdim=True) + 1e-10))
    # a tall matrix spreads its step over more outputs: each of them should move as far as those of a square one
    lr = lr * max(1.0, weights.size(1) / weights.size(2)) ** 0.5
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

    RMSProp without momentum, with one second moment for each row (R,), in float32. A row that occurs more than once
    gets the sum of its gradients: they are added up at one of its places, and all of them then write the same new row.
    """
    places = torch.arange(len(index), device=index.device)
    place = torch.zeros(len(square), dtype=torch.int64, device=index.device).scatter(0, index, places)[index]
    total = torch.zeros(grad.shape, device=index.device).index_add(0, place, grad.float())
    square.mul_(TABLE_BETA2)
    fresh = square[index] + (1 - TABLE_BETA2) * total.square().mean(1)[place]
    square[index] = fresh
    spread = (fresh / (1 - TABLE_BETA2**step)).sqrt() + 1e-10
    weight[index] = (weight[index].float() - lr * total[place] / spread[:, None]).to(weight.dtype)


class Muon:
    """Momentum, orthogonalized (Keller Jordan, Muon): matrices of one shape, stepped as one stack."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.start_lr, self.warmdown = parameters, lr, lr, WARMDOWN
        self.momentum, self.decay = MOMENTUM, WEIGHT_DECAY
        stack = self.stack(parameters)
        self.momenta = torch.zeros_like(stack)
        self.squares = torch.zeros_like(stack.sum(uneven(stack), keepdim=True))

    def stack(self, tensors):
        return torch.cat([t.view(-1, *t.shape[-2:]) for t in tensors])

    @torch.no_grad()
    def step(self):
        weights, grads = self.stack(self.parameters), self.stack([p.grad for p in self.parameters])
        scalars = (torch.tensor(scalar) for scalar in (self.lr, self.momentum, self.decay))
        compiled(muon_update)(weights, grads, self.momenta, self.squares, *scalars)
        stepped = weights.split([p.numel() // weights[0].numel() for p in self.parameters])
        torch._foreach_copy_(self.parameters, [w.view_as(p) for w, p in zip(stepped, self.parameters, strict=True)])


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
        self.tables, self.lr, self.start_lr, self.warmdown, self.steps = tables, lr, lr, 0.0, 0
        self.square = torch.zeros(len(tables.weight), device=DEVICE)

    @torch.no_grad()
    def step(self):
        self.steps += 1
        scalars = torch.tensor(self.lr), torch.tensor(float(self.steps))
        weight, index, grad = self.tables.weight, self.tables.found.flatten(), self.tables.grad
        compiled(table_update)(weight, self.square, index, grad.view(len(index), weight.size(1)), *scalars)


def make_optimizers(model):
    """One optimizer for each group of parameters that share a rate and a way to be stepped."""
    scale = (WIDTH / 768) ** -0.5       # the rates were tuned at width 768
    matrices = [p for module in (*model.attentions, *model.mlps) for p in module.parameters()]
    shapes = sorted({p.shape[-2:] for p in matrices})
    return [
        RowRMSProp(model.tables, TABLE_LR * scale),
        AdamW([model.embed, model.values], EMBEDDING_LR * scale),
        AdamW([model.head], HEAD_LR * scale),
        AdamW([model.residual], RESIDUAL_LR),
        AdamW([model.skip], SKIP_LR, SKIP_BETA1),
        *(Muon([p for p in matrices if p.shape[-2:] == shape], MATRIX_LR) for shape in shapes),
    ]


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


def train_step(model, optimizers, x, y, micro_rows):
    """One optimizer step on x and y (rows, T), some rows at a time. Returns the mean loss, still on the device."""
    tables = model.tables
    tables.found = compiled(tables.find)(x)
    total, grads = 0.0, []
    for tokens, targets, found in zip(*(tensor.split(micro_rows) for tensor in (x, y, tables.found)), strict=True):
        ngrams = tables(found).requires_grad_()
        h = compiled(model.hidden)(tokens, ngrams)
        loss = HeadLoss.apply(h.flatten(0, 1), model.head, targets.flatten()) * (len(tokens) / len(x))
        loss.backward()
        total += loss.detach()
        grads.append(ngrams.grad if NGRAMS else ngrams.detach())    # without n-grams empty, and of no part in the loss
    tables.grad = grads[0] if len(grads) == 1 else torch.cat(grads)
    for optimizer in optimizers:
        optimizer.step()
    model.drop_grads()
    return total


def warm_up(model, micro_rows):
    """Run everything once on random tokens, which on a GPU compiles it, then start again from the seed: the clock has
    not started yet.

    Returns the rows of a micro-batch that memory allows: they are halved until a step fits.
    """
    rows, optimizers = BATCH // T, make_optimizers(model)
    while True:
        tokens = torch.randint(V, (max(rows, ARENA.eval_rows), T), device=DEVICE)
        try:
            train_step(model, optimizers, tokens[:rows], tokens[:rows], micro_rows)
            break
        except torch.OutOfMemoryError:
            if micro_rows == 1:
                raise
        model.drop_grads()      # outside of `except`, whose traceback holds what the step allocated
        gc.collect()
        torch.cuda.empty_cache()
        micro_rows //= 2
        print(f"out of memory: {micro_rows} rows at a time now", flush=True)
    with torch.no_grad():
        compiled(model.eval())(tokens[: ARENA.eval_rows])   # as `finish` will call it, beside the optimizers' state
    model.train()
    model.initialize()
    return micro_rows


def refuse_machine():
    """End with one line where train.py cannot run."""
    instead = "AUTORESEARCH_ARENA=demo runs on any CPU"
    if DEVICE == "cpu" and ARENA.name != "demo":
        raise SystemExit(f"error: no NVIDIA GPU found, and the arena {ARENA.name} needs one; {instead}")
    if DEVICE == "cuda" and (capability := torch.cuda.get_device_capability()) < (8, 0):
        card = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
        raise SystemExit(f"error: the {card}, and train.py needs 8.0 or newer; {instead}")


def sizes():
    """Each constant that can fit badly, whether it fits, and what it must be; what comes later relies on what came."""
    for name in ("DEPTH", "HEADS", "HEAD_DIM", "BATCH", "MICRO_BATCH", "TABLE_ROWS", "MLP_RATIO", "GATE_CHANNELS",
                 "MOMENTUM_STEPS", "LOSS_CHUNK", "MAX_DOCUMENTS"):
        yield name, type(globals()[name]) is int and globals()[name] >= 1, "a whole number, at least 1"
    yield "HEAD_DIM", HEAD_DIM % 8 == 0 and HEAD_DIM <= 256, "a multiple of 8 up to 256, which attention kernels need"
    yield "BATCH", BATCH % T == 0, f"a multiple of {T}, the tokens in a row"
    yield "MICRO_BATCH", MICRO_BATCH % T == 0, f"a multiple of {T}, the tokens in a row"
    yield "MICRO_BATCH", BATCH % min(BATCH, MICRO_BATCH) == 0, f"a divisor of {BATCH}, the BATCH"
    yield "GATE_CHANNELS", GATE_CHANNELS <= WIDTH, f"at most {WIDTH}, the model's width"
    ngrams = type(NGRAMS) is tuple and all(type(n) is int and n >= 1 for n in NGRAMS)
    yield "NGRAMS", ngrams, "a tuple of whole numbers, at least 1, as in (2, 3), (2,) or ()"
    yield "WINDOWS", type(WINDOWS) is str and WINDOWS and set(WINDOWS) <= set("SL"), "letters S and L, at least one"


def refuse_sizes():
    """End with one line that names the constant which does not fit."""
    for name, fits, must in sizes():
        if not fits:
            raise SystemExit(f"error: {name} is {globals()[name]!r}, and must be {must}")


def check(loss):
    """Stop at once when training has diverged: a run that is lost should not cost five minutes."""
    if not loss < 100:      # worded so that NaN fails
        raise SystemExit(f"error: the loss diverged: {float(loss)}")


def settings():
    """All constants as this machine resolves them."""
    constants = ((name, value) for name, value in globals().items() if name.isupper())
    return "  ".join(f"{name}={value}" for name, value in constants if isinstance(value, int | float | str | tuple))


def report(loader, step, loss, flops):
    speed, left = loader.tokens / loader.elapsed(), max(ARENA.budget - loader.elapsed(), 0.0)
    print(f"step {step:5d}  {loader.progress:6.1%}  loss {loss:.4f}  {speed:,.0f} tok/s  "
          f"mfu {loader.mfu_percent(float(flops))}  {left:.0f} s left", flush=True)


def train(model, optimizers, loader, micro_rows):
    """Train until the loader's time is up. Returns what a token costs, in FLOPs."""
    losses, smooth = deque(maxlen=LAG + 1), 0.0
    for step, (x, y) in enumerate(loader):
        schedule(optimizers, step, loader.progress)
        losses.append(train_step(model, optimizers, x, y, micro_rows).to("cpu", non_blocking=True))
        if step == 0:
            flops = flops_per_token(model, x).to("cpu", non_blocking=True)
        if step >= LAG:
            check(losses[0])
            smooth += (float(losses[0]) - smooth) * max(0.1, 1 / (step - LAG + 1))
            if step % 10 == 0:
                report(loader, step, smooth, flops)
    for loss in losses:
        check(loss)
    return float(flops)


def main():
    refuse_machine()
    refuse_sizes()
    torch.set_float32_matmul_precision("high")
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
    loader = TrainLoader(BATCH // T, DEVICE)    # which tells when the arena is missing; no batch yet, and no clock
    print(textwrap.fill(settings(), 120), flush=True)
    start = time.perf_counter()
    model = GPT()
    micro_rows = warm_up(model, min(BATCH, MICRO_BATCH) // T)
    loader.register(compiled(model))    # what will be scored: its graph leaves before the first batch
    optimizers, compile_seconds = make_optimizers(model), time.perf_counter() - start
    size, tables = sum(p.numel() for p in model.parameters()), model.tables.weight.numel()
    print(f"{size:,} parameters, {tables:,} of them in n-gram tables; attention {ATTENTION}; "
          f"{BATCH // T} rows a step, {micro_rows} at a time; warmed up in {compile_seconds:.1f} s", flush=True)
    gc.collect()
    gc.freeze()     # a collection in the middle of the run would stall it
    gc.disable()
    flops = train(model, optimizers, loader, micro_rows)
    gc.unfreeze()
    gc.enable()
    finish(compiled(model), loader, depth=DEPTH, flops_per_token=flops, attention=ATTENTION, micro_batch=micro_rows * T,
           compile_seconds=f"{compile_seconds:.1f}")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: {str(error).partition('. ')[0]}: lower DEPTH, HEADS or TABLE_ROWS") from None
