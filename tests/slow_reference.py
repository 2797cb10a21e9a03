"""The model family from the papers' formulas: float64, one row, loops over tokens, heads and experts.

Reads the weights of a model of ours by their checkpoint names and shares no code with it.
Equation numbers: DeepSeek-V2 (arXiv:2405.04434) for MLA, DeepSeekMoE (arXiv:2401.06066) and DeepSeek-V3
(arXiv:2412.19437) for experts, routing, balance and multi-token prediction, YaRN (arXiv:2309.00071), NSA
(arXiv:2502.11089) for native sparse attention.
"""

import math

import torch


class SlowModel:
    """Logits and losses of one row of ids [S] at given positions; every method is a formula."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}

    def logits(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[S] -> float64 [S, vocab_size]"""
        return self.states(ids, positions) @ self.weights["lm_head.weight"].T

    def states(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[S] -> float64 [S, hidden_size] after the last norm"""
        positions = range(len(ids)) if positions is None else positions.tolist()
        states = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.config.num_hidden_layers):
            states = self.layer(i, states, positions)
        return self.norm("model.norm", states)

    def mtp_logits(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """V3 eq. 21-23 -> for module k float64 [S - k, vocab_size]; row t predicts token t + k + 1"""
        embeddings = self.weights["model.embed_tokens.weight"][ids]
        states, logits = self.states(ids), []
        for k in range(1, self.config.num_nextn_predict_layers + 1):
            i = self.config.num_hidden_layers + k - 1
            name = f"model.layers.{i}"
            joined = [
                torch.cat((self.norm(f"{name}.enorm", embeddings[t + k]), self.norm(f"{name}.hnorm", states[t])))
                for t in range(len(ids) - k)
            ]
            states = torch.stack(joined) @ self.weights[f"{name}.eh_proj.weight"].T
            states = self.layer(i, states, range(len(states)))
            logits.append(self.norm(f"{name}.shared_head.norm", states) @ self.weights["lm_head.weight"].T)
        return logits

    def layer(self, i: int, states: torch.Tensor, positions) -> torch.Tensor:
        name = f"model.layers.{i}"
        attend = {"mla": self.mla, "dsa": self.mla, "gqa": self.gqa, "nsa": self.nsa}[self.config.attention_kind]
        states = states + attend(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", states), positions)
        normed = self.norm(f"{name}.post_attention_layernorm", states)
        is_sparse = f"{name}.mlp.gate.weight" in self.weights
        mlp = self.experts if is_sparse else self.mlp
        return states + torch.stack([mlp(f"{name}.mlp", x) for x in normed])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.weights[f"{name}.weight"] * x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    # Attention

    def gqa(self, name: str, states: torch.Tensor, positions) -> torch.Tensor:
        """Every query head h reads key/value head h // (H / K), as in Llama."""
        heads, width = self.config.num_attention_heads, self.config.head_dim
        sharing = heads // self.config.num_key_value_heads
        queries, keys, values = (self.linear(f"{name}.{x}_proj", states) for x in "qkv")
        outputs = []
        for h in range(heads):
            own, shared = slice(h * width, (h + 1) * width), h // sharing
            shared = slice(shared * width, (shared + 1) * width)
            query = [self.rotate_halves(q, p) for q, p in zip(queries[:, own], positions, strict=True)]
            key = [self.rotate_halves(k, p) for k, p in zip(keys[:, shared], positions, strict=True)]
            outputs.append(attend_causally(query, key, values[:, shared], width**-0.5))
        return self.linear(f"{name}.o_proj", torch.cat(outputs, dim=-1))

    def mla(self, name: str, states: torch.Tensor, positions) -> torch.Tensor:
        """V2 eq. 9-19: nothing cached, nothing absorbed."""
        c = self.config
        nope, rope, wide = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        if c.q_lora_rank is None:
            queries = self.linear(f"{name}.q_proj", states)
        else:
            compressed = self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", states))
            queries = self.linear(f"{name}.q_b_proj", compressed)
        joint = self.linear(f"{name}.kv_a_proj_with_mqa", states)
        latents = self.norm(f"{name}.kv_a_layernorm", joint[:, : c.kv_lora_rank])
        key_rope = [self.rotate_pairs(k, p) for k, p in zip(joint[:, c.kv_lora_rank :], positions, strict=True)]
        expanded = self.linear(f"{name}.kv_b_proj", latents)
        outputs = []
        for h in range(c.num_attention_heads):
            own_q = queries[:, h * (nope + rope) : (h + 1) * (nope + rope)]
            own_kv = expanded[:, h * (nope + wide) : (h + 1) * (nope + wide)]
            query = [
                torch.cat((q[:nope], self.rotate_pairs(q[nope:], p))) for q, p in zip(own_q, positions, strict=True)
            ]
            key = [torch.cat((k[:nope], r)) for k, r in zip(own_kv, key_rope, strict=True)]
            outputs.append(attend_causally(query, key, own_kv[:, nope:], self.mla_scale()))
        return self.linear(f"{name}.o_proj", torch.cat(outputs, dim=-1))

    def nsa(self, name: str, states: torch.Tensor, positions) -> torch.Tensor:
        """NSA eq. 5-12; blocks, entries and tokens are counted from 0, and a block's score is the probability of each
        entry times the tokens that the two share. Rotation in the selected and the window branch only."""
        c, length = self.config, len(states)
        assert list(positions) == list(range(length))
        heads, width, scale = c.num_attention_heads, c.head_dim, c.head_dim**-0.5
        sharing = heads // c.num_key_value_heads
        block, stride, select = c.nsa_compress_block_size, c.nsa_compress_stride, c.nsa_select_block_size
        gates = torch.sigmoid(self.linear(f"{name}.branch_gate", states)).view(length, heads, 3)
        outputs = torch.zeros(length, heads, width, dtype=torch.float64)

        def head(projection: str, h: int, rotated: bool) -> torch.Tensor:
            vectors = self.linear(f"{name}.{projection}", states)[:, h * width : (h + 1) * width]  # [S, D]
            return torch.stack([self.rotate_halves(v, t) for t, v in enumerate(vectors)]) if rotated else vectors

        def entry(compressor: str, tokens: torch.Tensor) -> torch.Tensor:
            x = self.linear(
                f"{name}.{compressor}.up_proj", (tokens + self.weights[f"{name}.{compressor}.position"]).flatten()
            )
            return tokens.mean(dim=0) + self.linear(f"{name}.{compressor}.down_proj", x * torch.sigmoid(x))

        starts = range(0, length - block + 1, stride)
        for k in range(c.num_key_value_heads):
            group = range(k * sharing, (k + 1) * sharing)
            raw_key, raw_value = head("compress_k_proj", k, False), head("compress_v_proj", k, False)
            entry_keys = [entry("compress_key", raw_key[i : i + block]) for i in starts]
            entry_values = [entry("compress_value", raw_value[i : i + block]) for i in starts]
            branches = [
                (head(f"{branch}_k_proj", k, True), head(f"{branch}_v_proj", k, False))
                for branch in ("select", "window")
            ]
            plain = {h: head("q_proj", h, False) for h in group}
            rotated = {h: head("q_proj", h, True) for h in group}
            for t in range(length):
                ended = [i for i, start in enumerate(starts) if start + block <= t + 1]
                score = [0.0] * (t // select + 1)
                for h in group if ended else ():
                    logits = torch.stack([plain[h][t] @ entry_keys[i] * scale for i in ended])
                    probs = logits.softmax(dim=0)
                    outputs[t, h] += gates[t, h, 0] * sum(
                        p * entry_values[i] for p, i in zip(probs, ended, strict=True)
                    )
                    for p, i in zip(probs.tolist(), ended, strict=True):
                        for token in range(starts[i], starts[i] + block):
                            score[token // select] += p
                fixed = {j for j in range(len(score)) if j < c.nsa_num_init_blocks}
                fixed |= {j for j in range(len(score)) if j > t // select - c.nsa_num_local_blocks}
                ranked = sorted(range(len(score)), key=lambda j: (j in fixed, score[j]), reverse=True)
                chosen = ranked[: c.nsa_num_select_blocks]
                read = (
                    [s for s in range(t + 1) if s // select in chosen],
                    [s for s in range(t + 1) if s > t - c.nsa_window_size],
                )
                for branch, ((keys, values), tokens) in enumerate(zip(branches, read, strict=True)):
                    for h in group:
                        probs = (keys[tokens] @ rotated[h][t] * scale).softmax(dim=0)
                        outputs[t, h] += gates[t, h, branch + 1] * (probs @ values[tokens])
        return self.linear(f"{name}.o_proj", outputs.flatten(1))

    def mla_scale(self) -> float:
        scale = (self.config.qk_nope_head_dim + self.config.qk_rope_head_dim) ** -0.5
        rope = self.config.rope_parameters
        if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
        return scale

    def frequencies(self, width: int) -> list[float]:
        """theta_i of RoPE, stretched as YaRN does: fast pairs stay, slow ones turn `factor` times slower."""
        rope = self.config.rope_parameters
        base = rope["rope_theta"]
        plain = [base ** (-2 * i / width) for i in range(width // 2)]
        if rope["rope_type"] == "default":
            return plain

        def pair_with(rotations: float) -> float:  # the pair that turns so often within the original context
            original = rope["original_max_position_embeddings"]
            return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_with(rope["beta_fast"])), 0)
        high = min(math.ceil(pair_with(rope["beta_slow"])), width - 1)
        slow = [min(max((i - low) / max(high - low, 0.001), 0), 1) for i in range(width // 2)]
        return [f * (1 - s) + f / rope["factor"] * s for f, s in zip(plain, slow, strict=True)]

    def rotate_halves(self, x: torch.Tensor, position: int) -> torch.Tensor:
        result, half = x.clone(), len(x) // 2
        for i, frequency in enumerate(self.frequencies(len(x))):
            result[i], result[i + half] = turn(x[i], x[i + half], position * frequency)
        return result

    def rotate_pairs(self, x: torch.Tensor, position: int) -> torch.Tensor:
        result = x.clone()
        for i, frequency in enumerate(self.frequencies(len(x))):
            result[2 * i], result[2 * i + 1] = turn(x[2 * i], x[2 * i + 1], position * frequency)
        return result

    # MLPs

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * up)

    def experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """One token x [D]: shared experts plus the weighted chosen ones; V3 eq. 12-16."""
        output = self.mlp(f"{name}.shared_experts", x) if self.config.n_shared_experts else torch.zeros_like(x)
        for expert, weight in self.route(name, x).items():
            gate, up = (self.weights[f"{name}.experts.gate_up_proj"][expert] @ x).chunk(2)
            output = output + weight * self.weights[f"{name}.experts.down_proj"][expert] @ (
                gate * torch.sigmoid(gate) * up
            )
        return output

    def scores(self, name: str, x: torch.Tensor) -> torch.Tensor:
        logits = self.weights[f"{name}.gate.weight"] @ x
        return logits.softmax(dim=0) if self.config.scoring_func == "softmax" else torch.sigmoid(logits)

    def route(self, name: str, x: torch.Tensor) -> dict[int, float]:
        """-> the chosen experts and their weights"""
        c = self.config
        scores = self.scores(name, x).tolist()
        ranked = list(scores)
        if c.topk_method == "noaux_tc":
            bias = self.weights[f"{name}.gate.e_score_correction_bias"].tolist()
            ranked = [s + b for s, b in zip(scores, bias, strict=True)]
        candidates = range(len(scores))
        if c.topk_method != "greedy":
            size, counted = len(scores) // c.n_group, 2 if c.topk_method == "noaux_tc" else 1
            groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
            groups.sort(
                key=lambda group: sum(sorted((ranked[i] for i in group), reverse=True)[:counted]), reverse=True
            )
            candidates = [i for group in groups[: c.topk_group] for i in group]
        chosen = sorted(candidates, key=lambda i: ranked[i], reverse=True)[: c.num_experts_per_tok]
        total = sum(scores[i] for i in chosen) if c.norm_topk_prob else 1.0
        return {i: scores[i] / total * c.routed_scaling_factor for i in chosen}


def turn(a: torch.Tensor, b: torch.Tensor, angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    return a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)


def attend_causally(query: list, key: list, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Token t mixes the values of tokens 0 .. t -> [S, width]"""
    outputs = []
    for t in range(len(query)):
        scores = torch.stack([query[t] @ key[s] * scale for s in range(t + 1)])
        outputs.append(scores.softmax(dim=0) @ values[: t + 1])
    return torch.stack(outputs)


def slow_cross_entropy(logits: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Sum over rows of -log softmax(logits)[target]."""
    return -sum(row[target] - row.logsumexp(dim=0) for row, target in zip(logits, targets, strict=True))


def slow_balance_loss(scores: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """V3 eq. 17-20 without alpha, averaged over the rows; scores [B, S, E], indices [B, S, P], mask [B, S]."""
    rows = []
    for b in range(len(scores)):
        tokens = [t for t in range(scores.shape[1]) if mask is None or mask[b, t]]
        if not tokens:
            continue
        loss = 0.0
        for expert in range(scores.shape[2]):
            chosen = sum((indices[b, t] == expert).any().item() for t in tokens)
            fraction = chosen * scores.shape[2] / (indices.shape[2] * len(tokens))
            share = sum((scores[b, t, expert] / scores[b, t].sum()).item() for t in tokens) / len(tokens)
            loss += fraction * share
        rows.append(loss)
    return sum(rows) / len(rows)
