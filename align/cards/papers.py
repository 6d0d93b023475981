"""The papers of the methods of alignment, and their citations."""

import re
from typing import NamedTuple

__all__ = ["PAPERS", "Paper", "papers_in"]


class Paper(NamedTuple):
    """A paper on arXiv."""

    arxiv: str
    title: str
    authors: str
    """As in BibTeX: the first author, and `others` where there are more."""
    year: int

    @property
    def url(self) -> str:
        """Return the address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """Return the citation in BibTeX.

        Examples:
            >>> print(Paper("2305.18290", "Direct Preference Optimization", "Rafael Rafailov and others", 2023).bibtex)
            @misc{rafailov2023_2305_18290,
              title         = {{Direct Preference Optimization}},
              author        = {Rafael Rafailov and others},
              year          = {2023},
              eprint        = {2305.18290},
              archivePrefix = {arXiv},
              url           = {https://arxiv.org/abs/2305.18290}
            }
        """
        surname = re.sub(r"\W", "", self.authors.split(" and ")[0].split()[-1].lower())
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": self.year,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": self.url,
        }
        lines = ",\n".join(f"  {name:13} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{surname}{self.year}_{self.arxiv.replace('.', '_')},\n{lines}\n}}"


_OTHERS = "and others"
PAPERS = {
    paper.arxiv: paper
    for paper in (
        Paper("1503.02531", "Distilling the Knowledge in a Neural Network", f"Geoffrey Hinton {_OTHERS}", 2015),
        Paper(
            "1610.02424",
            "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
            f"Ashwin K. Vijayakumar {_OTHERS}",
            2016,
        ),
        Paper("2203.16804", "BRIO: Bringing Order to Abstractive Summarization", f"Yixin Liu {_OTHERS}", 2022),
        Paper("2205.14690", "CoNT: Contrastive Neural Text Generation", f"Chenxin An {_OTHERS}", 2022),
        Paper(
            "2307.04507",
            "Improving Factuality of Abstractive Summarization via Contrastive Reward Learning",
            f"I-Chun Chern {_OTHERS}",
            2023,
        ),
        Paper("1606.07947", "Sequence-Level Knowledge Distillation", "Yoon Kim and Alexander M. Rush", 2016),
        Paper(
            "2210.15097",
            "Contrastive Decoding: Open-ended Text Generation as Optimization",
            f"Xiang Lisa Li {_OTHERS}",
            2022,
        ),
        Paper(
            "2212.10938",
            "Critic-Guided Decoding for Controlled Text Generation",
            f"Minbeom Kim {_OTHERS}",
            2022,
        ),
        Paper(
            "2305.10425",
            "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
            f"Yao Zhao {_OTHERS}",
            2023,
        ),
        Paper(
            "2305.18290",
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            f"Rafael Rafailov {_OTHERS}",
            2023,
        ),
        Paper("2306.08543", "MiniLLM: Knowledge Distillation of Large Language Models", f"Yuxian Gu {_OTHERS}", 2023),
        Paper(
            "2306.13649",
            "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
            f"Rishabh Agarwal {_OTHERS}",
            2023,
        ),
        Paper("2307.09288", "Llama 2: Open Foundation and Fine-Tuned Chat Models", f"Hugo Touvron {_OTHERS}", 2023),
        Paper(
            "2307.15190",
            "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
            f"Yuqiao Wen {_OTHERS}",
            2023,
        ),
        Paper(
            "2309.09117",
            "Contrastive Decoding Improves Reasoning in Large Language Models",
            "Sean O'Brien and Mike Lewis",
            2023,
        ),
        Paper(
            "2310.12036",
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            f"Mohammad Gheshlaghi Azar {_OTHERS}",
            2023,
        ),
        Paper(
            "2401.08417",
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
            f"Haoran Xu {_OTHERS}",
            2024,
        ),
        Paper(
            "2401.06121",
            "TOFU: A Task of Fictitious Unlearning for LLMs",
            f"Pratyush Maini {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.01306",
            "KTO: Model Alignment as Prospect Theoretic Optimization",
            f"Kawin Ethayarajh {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.12030",
            "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
            f"Nicolas Boizard {_OTHERS}",
            2024,
        ),
        Paper(
            "2405.13014",
            "QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models",
            f"Wei Wang {_OTHERS}",
            2024,
        ),
        Paper(
            "2404.05868",
            "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
            f"Ruiqi Zhang {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.00856",
            "Towards Efficient Exact Optimization of Language Model Alignment",
            f"Haozhe Ji {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.03898",
            "DistiLLM: Towards Streamlined Distillation for Large Language Models",
            f"Jongwoo Ko {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.05369",
            "Noise Contrastive Alignment of Language Models with Explicit Rewards",
            f"Huayu Chen {_OTHERS}",
            2024,
        ),
        Paper(
            "2402.13228",
            "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
            f"Arka Pal {_OTHERS}",
            2024,
        ),
        Paper(
            "2403.07691",
            "ORPO: Monolithic Preference Optimization without Reference Model",
            f"Jiwoo Hong {_OTHERS}",
            2024,
        ),
        Paper("2402.10571", "Direct Preference Optimization with an Offset", f"Afra Amini {_OTHERS}", 2024),
        Paper(
            "2403.00409",
            "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
            f"Sayak Ray Chowdhury {_OTHERS}",
            2024,
        ),
        Paper(
            "2404.04656",
            "Binary Classifier Optimization for Large Language Model Alignment",
            f"Seungjae Jung {_OTHERS}",
            2024,
        ),
        Paper("2404.11999", "Token-level Direct Preference Optimization", f"Yongcheng Zeng {_OTHERS}", 2024),
        Paper(
            "2405.00675",
            "Self-Play Preference Optimization for Language Model Alignment",
            f"Yue Wu {_OTHERS}",
            2024,
        ),
        Paper(
            "2405.14734",
            "SimPO: Simple Preference Optimization with a Reference-Free Reward",
            f"Yu Meng {_OTHERS}",
            2024,
        ),
        Paper(
            "2406.05882",
            "Distributional Preference Alignment of LLMs via Optimal Transport",
            f"Igor Melnyk {_OTHERS}",
            2024,
        ),
        Paper(
            "2406.08414",
            "Discovering Preference Optimization Algorithms with and for Large Language Models",
            f"Chris Lu {_OTHERS}",
            2024,
        ),
        Paper(
            "2408.06266",
            "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
            f"Karel D'Oosterlinck {_OTHERS}",
            2024,
        ),
        Paper(
            "2410.03115",
            "X-ALMA: Plug & Play Modules and Adaptive Rejection for Quality Translation at Scale",
            f"Haoran Xu {_OTHERS}",
            2024,
        ),
        Paper(
            "2410.05102",
            "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
            f"Fenia Christopoulou {_OTHERS}",
            2024,
        ),
        Paper(
            "2411.15124",
            "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
            f"Nathan Lambert {_OTHERS}",
            2024,
        ),
        Paper(
            "2412.03822",
            "Beyond the Binary: Capturing Diverse Preferences With Reward Regularization",
            f"Vishakh Padmakumar {_OTHERS}",
            2024,
        ),
        Paper(
            "2412.14516",
            "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment",
            f"Teng Xiao {_OTHERS}",
            2024,
        ),
        Paper("2501.03884", "AlphaPO: Reward Shape Matters for LLM Alignment", f"Aman Gupta {_OTHERS}", 2025),
        Paper(
            "2502.00883",
            "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
            f"Teng Xiao {_OTHERS}",
            2025,
        ),
        Paper(
            "2406.11839",
            "mDPO: Conditional Preference Optimization for Multimodal Large Language Models",
            f"Fei Wang {_OTHERS}",
            2024,
        ),
        Paper(
            "2502.13928",
            "Symmetrical Visual Contrastive Optimization: Aligning Vision-Language Models with Minimal Contrastive Images",
            f"Shengguang Wu {_OTHERS}",
            2025,
        ),
        Paper(
            "2503.07067",
            "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs",
            f"Jongwoo Ko {_OTHERS}",
            2025,
        ),
        Paper("2202.06417", "A Contrastive Framework for Neural Text Generation", f"Yixuan Su {_OTHERS}", 2022),
        Paper(
            "2405.17871",
            "Seeing the Image: Prioritizing Visual Correlation by Contrastive Alignment",
            f"Xin Xiao {_OTHERS}",
            2024,
        ),
    )
}
"""The papers by their numbers on arXiv."""


def papers_in(text: str) -> list[Paper]:
    """Return the papers that a text cites by their numbers on arXiv, in their order; others that it cites are left out.

    Args:
        text: such as the description of a loss.

    Examples:
        >>> [paper.authors for paper in papers_in("APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266)")]
        ["Karel D'Oosterlinck and others"]
    """
    found = dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))
    return [PAPERS[number] for number in found if number in PAPERS]
