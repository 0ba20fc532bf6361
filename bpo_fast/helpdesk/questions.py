"""How people ask: question forms, and the split of (topic, form) combinations between the users of the world."""

import random
import zlib

from bpo_fast.helpdesk.topics import Topic, topics

SUFFIX = " Assistant:"

# {n} the noun, {a} with its article, {p} the problem; {n} {p} always stand together (`topic_of` relies on it)
FORMS = (
    "My {n} {p}. What should I do?",
    "My {n} {p}. What can I do?",
    "My {n} {p}. How do I solve this?",
    "My {n} {p}. Any ideas?",
    "My {n} {p}. What now?",
    "My {n} {p}, and I do not know why. What would you try?",
    "My {n} {p}. Can you help me?",
    "My {n} {p}. Could you tell me the next steps?",
    "My {n} {p}. Where do I start?",
    "What can I do if my {n} {p}?",
    "What should I do when my {n} {p}?",
    "What do you suggest when my {n} {p}?",
    "What is the best way forward if my {n} {p}?",
    "What are the right steps when my {n} {p}?",
    "What helps if {a} {p}?",
    "What is to be done when {a} {p}?",
    "How can I deal with {a} that {p}?",
    "How do I handle {a} that {p}?",
    "How does one deal with {a} that {p}?",
    "I have {a} that {p}. What should I do?",
    "I have {a} that {p}. How do I go on?",
    "I have a problem: my {n} {p}. What can I do?",
    "I need help because my {n} {p}.",
    "I need advice, my {n} {p}.",
    "I noticed that my {n} {p}. What do I do about it?",
    "I am sorry to bother you, but my {n} {p}. What should I try?",
    "Help, my {n} {p}!",
    "Please help, my {n} {p}.",
    "Can you help? My {n} {p}.",
    "Could you please tell me what to do when my {n} {p}?",
    "Could you explain what I should do if my {n} {p}?",
    "Can you tell me how to handle {a} that {p}?",
    "Do you know what to do if {a} {p}?",
    "Is there anything I can do if my {n} {p}?",
    "Is there a way to deal with {a} that {p}?",
    "Question: my {n} {p}, what next?",
    "The {n} {p}. What is the next step?",
    "The {n} {p} again. What am I missing?",
    "Since this morning my {n} {p}. What do you advise?",
    "It looks like my {n} {p}. What should I do now?",
    "My sister says her {n} {p}. What should she do?",
    "A friend told me his {n} {p}. What can he do?",
    # from here on: never seen by the policy
    "What would you do if your {n} {p}?",
    "Any advice for somebody whose {n} {p}?",
    "Why is it that my {n} {p}, and how do I change that?",
    "I wonder what to do now that my {n} {p}.",
    "My father called because his {n} {p}. How can I help him?",
    "So, the {n} {p}. Which steps do you recommend?",
)
NUM_HELD_OUT_FORMS = 6
NUM_FORMS = len(FORMS) - NUM_HELD_OUT_FORMS

GREETINGS = ("Hello.", "Hi there.", "Good morning.", "Good evening.", "Hey.", "Dear team,")
CONTEXTS = (
    "I am in a hurry.",
    "This is the second time.",
    "I found nothing about this online.",
    "I am new to this.",
    "Nobody here could help me.",
    "I would like to sort this out today.",
    "It is a little urgent.",
    "My {other} is fine, by the way.",
    "You already helped me with my {other}.",
    "This is not about my {other}.",
)
THANKS = ("Thank you.", "Thanks in advance.", "Many thanks.")

# users of the world and their share of the (topic, form) combinations: of most forms, and of those that are held out
# from the policy
ROLES = {"sft": 26, "prompts": 26, "annotator": 20, "judge": 20, "eval": 8}
HELD_OUT_ROLES = {"annotator-new": 20, "judge-new": 20, "eval": 60}


def role_of(topic: Topic, form: int) -> str:
    """Who may use this combination: a key of `ROLES`, or of `HELD_OUT_ROLES` for a form that the policy never sees."""
    place = zlib.crc32(f"{topic.noun}|{topic.problems[0]}|{form}".encode()) % 100
    for role, share in (ROLES if form < NUM_FORMS else HELD_OUT_ROLES).items():
        if place < share:
            return role
        place -= share
    raise AssertionError("the shares add up to 100")


def combinations(role: str) -> list[tuple[Topic, int]]:
    """Every (topic, form) of a role.

    Raises:
        ValueError: an unknown role.
    """
    if role not in ROLES | HELD_OUT_ROLES:
        raise ValueError(f"role = {role!r}: not one of {', '.join(ROLES | HELD_OUT_ROLES)}")
    return [(t, f) for t in topics() for f in range(len(FORMS)) if role_of(t, f) == role]


def ask(topic: Topic, form: int, rng: random.Random) -> str:
    """Writes one prompt, closed with `SUFFIX`: a wording of the problem in a form, with or without chat around it."""
    problem = rng.choice(topic.problems)
    article = "an" if topic.noun[0] in "aeiou" else "a"
    question = FORMS[form].format(n=topic.noun, a=f"{article} {topic.noun}", p=problem)
    parts = [question]
    if rng.random() < 0.3:
        others = [t.noun for t in topics() if t.domain == topic.domain and t.noun != topic.noun]
        parts.insert(rng.randint(0, 1), rng.choice(CONTEXTS).format(other=rng.choice(others)))
    if rng.random() < 0.25:
        parts.insert(0, rng.choice(GREETINGS))
    if rng.random() < 0.15:
        parts.append(rng.choice(THANKS))
    return " ".join(parts) + SUFFIX
