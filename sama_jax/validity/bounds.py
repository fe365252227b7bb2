"""The thresholds of all gates. Those marked "judgement" follow from no theory; docs list them."""

DRIFT_P = 0.01
"""Judgement: below this p-value (Kolmogorov-Smirnov, tokens a text) texts to be judged are of other
lengths than those that calibrated. Texts of one source are refused once in a hundred times."""

# --- texts ---------------------------------------------------------------------------------------

SHINGLE_WORDS = 5
NEAR_DUPLICATE = 0.8
"""Share of common runs of `SHINGLE_WORDS` words (Jaccard) from which two texts are one. Judgement;
usual where corpora are cleaned. In 7,000 documents of seven kinds no pair reaches it."""
OVERLAP_WORDS, OVERLAP = 13, 0.8
"""Runs of words, and the share of a non-member's that stand in members from which it is no
non-member: MIMIR's split `ngram_13_0.8`."""
WRONG_LABELS = 0.05
"""Share of texts whose label means nothing above which the result is void. Judgement: with 5 % of
the labels of each class exchanged an AUC of 1 falls to .95."""
OVERLAPPING = 0.01
"""Share of non-members with such an overlap that weakens a result. Judgement: random halves of real
documents have at most .2 %."""
REPEATED = 0.05
"""Share of texts, or of groups, that nearly repeat another one of their class. Judgement."""
CUT_P = 0.01
"""Fisher's p below which one class is cut more often than the other."""
EXACT_SHINGLES = 20_000_000
"""Runs of words that are compared exactly; of more, a sample. 20,000 long texts, 1 GB."""
BLIND_P = 0.02
"""p, corrected for all baselines, below which texts tell the classes apart without a model.
Judgement: below the usual .05, since every audit asks, and a fair split should pass."""
BLIND_VOID = 0.6
"""AUC without a model that voids a result if the 95 % bound of the best baseline lies above it.
Judgement: an attack that finds no membership at all reaches it by the source alone."""
BLIND_TEXTS = 2000
"""Texts that the baselines read; of more, a random sample. A fair AUC then has a s.d. of .013."""

# --- losses and scores ---------------------------------------------------------------------------

MIN_TEXTS = 40
"""Texts below which losses are not compared with the frequencies of tokens, which fewer texts do
not tell. Judgement."""
SAME_SHARE = 0.5
"""Share of equal losses from which two models are one. Judgement: it is .003 in the demo."""
WORSE_NATS = 0.5
"""Nats a token by which a target may predict all classes worse than its reference. Judgement."""
WORSE_SHARE = 0.5
"""Share of texts that the reference may predict better than the target. Judgement."""
WORSE_P = 0.01
"""Binomial p below which it surely does: six texts never do so."""
TIED_PAIRS = 0.2
"""Share of pairs of a member and a non-member with one score. Judgement."""
TOP_SHARE = 0.1
"""Share of non-members with the highest score. Judgement: no threshold finds a member at a lower
rate of false alarms."""
CONTROL_P = 0.001
"""p of the primary attack on the positive control at which it is found. Judgement: 7 texts that
stand above 7 non-members reach it."""
CONTROL_TEXTS = 7
"""Fewer texts, or documents, of a control cannot reach that p against as many non-members; those of
few documents could against more, since nothing tells how much such documents differ."""
MISSING_SHARE = 0.2
"""Judgement: share of the labelled texts without a score from which the rest are no fair sample."""
MISSING_P = 0.01
"""Fisher's p below which scores are missing in one class more than in the other."""
HALVINGS, HALVES_APART = 50, 0.25
"""Random halvings of the non-members, and the share of them whose interval may lie beside an AUC of
0.5. A sound interval does in .05 of them, and in more than this share once in a million audits;
one that lies beside it in .1 of them, once in a thousand."""
HALVED = 20
"""Fewer non-members, or documents of them, are not halved. Judgement."""
SECOND_TEXTS = 100
"""Texts that are scored under other masks, at most. Their correlation is then known to about .1."""
DOCUMENTS = 10
"""Documents of a class, where one has several texts, below which nothing is concluded. Judgement:
with 10 or more the test errs in .00 to .03 of audits without membership (nominal: .025) and the
intervals hold in .92 to .97; with 5 documents of unequal sizes it errs in up to .04."""
RELIABLE, SAME_AUC = 0.7, 0.02
"""Correlation of scores under two draws of masks below which they are mostly luck, and difference
of AUCs below which both are the same. Judgement."""
