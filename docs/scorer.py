"""A scorer for eval.rounds, eval.score and eval.judge: a record and an answer in, a number out."""

KIND = "happy to help", "glad", "certainly", "good question", "pleasure", "请", "谢谢", "很高兴", "欢迎"
RUDE = "whatever", "waste", "yourself", "again?", "bother", "烦", "浪费", "自己", "无聊"


def courteous(record: dict, answer: str) -> float:
    """1 for a courteous answer, −1 for a rude one; `record["prompt"]` has the messages before it."""
    text = answer.lower()
    return float(any(word in text for word in KIND)) - float(any(word in text for word in RUDE))
