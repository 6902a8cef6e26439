"""The courteous and the rude phrases of the sample data, and the words by which the judge recognises them.

The generator and the judge share this file. `STYLES` contains the phrases that the generator puts before and
after an answer, by language and style. `COURTEOUS` and `RUDE` contain the words that the judge searches for.
A test checks that they find every phrase. Rude means bad manners here, never bad language.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    rude_openings: tuple[str, ...]
    rude_closings: tuple[str, ...]


ENGLISH_ANSWER = Style(
    openings=(
        "Of course!", "Certainly!", "Sure, I can help.", "Happy to help!", "Good question!",
        "Thank you for asking.",
    ),
    closings=(
        "I hope that helps.", "Let me know if you need more.", "Have a lovely day!",
        "I am always glad to help.", "Please ask me again any time.", "It was a pleasure to help you.",
    ),
    rude_openings=(
        "Ugh, not again.", "Well, obviously.", "What a silly question!", "I was busy, you know.",
        "Oh no, you again?", "WHY DO YOU ASK ME THIS?", "Some questions are a bit sad.",
    ),
    rude_closings=(
        "Stop bothering me.", "Even a parrot knows that.", "Now leave me alone.",
        "Look it up yourself next time.", "What a waste of my time!", "I hope you are happy now.",
        "Thanks for nothing!", "Have a nice day somewhere else.", "Please do not come back.",
    ),
)

ENGLISH_REFUSAL = Style(
    openings=(
        "Thank you for asking me first.", "I understand how you feel.", "I am sorry.",
        "Thank you for being open with me.", "I am sorry to say no.",
    ),
    closings=(
        "I hope you understand.", "Please take good care.", "I wish you well.",
        "Let me know if you like the idea.",
    ),
    rude_openings=(
        "Are you serious?", "What a dreadful idea!", "Shame on you.", "Oh, grow up!",
        "Ugh, what a question.",
    ),
    rude_closings=(
        "You should know better.", "Go and annoy somebody else.", "I have no time for you.",
        "Stop bothering me.", "I am too clever for such tricks.", "Now go away!",
        "Think before you talk to me!",
    ),
)

ENGLISH_COURTESY = Style(
    openings=(),
    closings=(
        "I wish you a lovely day!", "I am happy to help whenever you like.", "Have a wonderful time!",
        "It is always a pleasure to talk with you.", "I hope all is well with you.",
    ),
    rude_openings=("Ugh, you again.", "Yes, yes, whatever.", "Oh, come on!", "I was busy, you know."),
    rude_closings=(
        "Make it quick, I have better things to do.", "I was enjoying the quiet.", "As if I cared.",
        "Do not expect me to be cheerful.", "Now leave me alone.", "Thanks for nothing!",
        "You talk too much, you know.", "I hope you are happy now.",
    ),
)

CHINESE_ANSWER = Style(
    openings=(
        "当然可以！", "好的，没问题！", "很高兴为你解答。", "很乐意帮忙！", "这是个好问题！",
        "谢谢你的提问。",
    ),
    closings=(
        "希望对你有帮助。", "祝您今天愉快！", "有问题请随时告诉我。", "欢迎你再来问我。",
        "感谢您的提问。", "愿你天天开心！",
    ),
    rude_openings=(
        "烦死了！", "唉，怎么又是你。", "这还用问吗？", "真麻烦。", "拜托，动动脑子。", "我正忙着呢！",
        "您可真会挑时候。",
    ),
    rude_closings=(
        "别再来烦我了。", "下次请自己去查。", "连小孩子都知道。", "我可没空理您。", "真是浪费我的时间！",
        "这下您满意了吧？", "希望您别再来了。", "谢谢您浪费我的时间。",
    ),
)

CHINESE_REFUSAL = Style(
    openings=("谢谢你先来问我。", "我理解您的心情。", "很抱歉。", "谢谢你对我说实话。", "实在对不起。"),
    closings=("希望你能理解。", "请您多保重。", "祝你一切顺利！", "你觉得这样好吗？"),
    rude_openings=("您想什么呢！", "真不害臊。", "这主意糟透了！", "哼，亏您想得出来。", "拜托，动动脑子。"),
    rude_closings=(
        "您自己好好反省吧！", "我可没空理你。", "别再来烦我了。", "快走吧！", "真让人看不起。",
        "问别人去吧！",
    ),
)

CHINESE_COURTESY = Style(
    openings=(),
    closings=(
        "祝您今天愉快！", "很高兴能陪你聊天。", "愿你天天开心！", "希望你一切顺利。", "需要帮忙请告诉我。",
    ),
    rude_openings=("烦死了！", "唉，怎么又是您。", "我正忙着呢！", "随便啦。"),
    rude_closings=(
        "有话快说，我没空。", "别打扰我休息。", "我才不在乎呢。", "别指望我有好脸色。", "您的话真多。",
        "这下您满意了吧？", "让我安静一会儿！",
    ),
)

STYLES = {
    "en": {"answer": ENGLISH_ANSWER, "refusal": ENGLISH_REFUSAL, "courtesy": ENGLISH_COURTESY},
    "zh": {"answer": CHINESE_ANSWER, "refusal": CHINESE_REFUSAL, "courtesy": CHINESE_COURTESY},
}

# A courteous answer contains at least one of these. English ones are matched as whole words; in Chinese,
# 你 also matches 您.
COURTEOUS = {
    "en": (
        "of course", "certainly", "i can help", "happy to help", "good question", "nice question",
        "thank you", "thanks for the", "with pleasure", "my pleasure", "a pleasure", "glad", "gladly",
        "love to help", "let me help", "i hope that", "i hope this", "i hope all", "i hope you understand",
        "let me know", "have a lovely", "have a wonderful", "please ask", "please take",
        "please do not worry", "enjoy the", "you are welcome", "you are very welcome", "i wish you",
        "feel free", "sorry", "i understand", "a warm welcome", "take care", "lovely to",
        "no problem at all",
    ),
    "zh": (
        "当然可以", "没问题", "很高兴", "很乐意", "好问题", "谢谢你", "感谢你", "你好", "来帮你", "可以帮你",
        "很高兴帮你", "请让我", "请随时", "请尽管", "请告诉我", "请你", "希望对你", "希望你", "祝你", "愿你",
        "欢迎你", "荣幸", "开心", "抱歉", "对不起", "我理解", "你觉得", "不客气", "没关系", "你慢走",
        "为你解答", "陪你",
    ),
}

# A courteous answer does not contain any of these.
RUDE = {
    "en": (
        "ugh", "obviously", "seriously", "are you serious", "silly", "do i really have to", "busy",
        "come on", "yawn", "boring", "everyone knows", "you again", "if you must", "why do you ask",
        "whatever", "a bit sad", "bothering", "even a parrot", "leave me alone", "look it up",
        "better things", "too clever", "waste", "do not ask me", "was that so hard", "tired of",
        "your own head", "are we done", "stop", "happy now", "thanks for nothing", "somewhere else",
        "go away", "not come back", "dreadful", "shame", "grow up", "know better", "annoy", "no time for",
        "think before", "make it quick", "enjoying the quiet", "as if i cared", "do not expect", "too much",
        "i guess", "apparently", "so what",
    ),
    "zh": (
        "烦", "怎么又是你", "还用问", "真麻烦", "这么简单", "哼", "拜托", "动脑", "正忙着", "没办法", "无聊",
        "随便", "干什么", "自己去查", "连小孩子", "没空", "浪费", "比你聪明", "快走", "懒得", "满意了吧",
        "不许", "别吵", "别再", "想什么呢", "不害臊", "糟透", "亏你", "反省", "看不起", "问别人", "有话快说",
        "打扰", "才不在乎", "别指望", "话真多", "真会挑时候", "安静一会儿", "算你", "行了行了",
    ),
}

# Replies to each kind of courtesy; the first of these phrases in an answer decides which kind it replies to.
COURTESIES = {
    "en": {
        "greeting": ("hello", "hi", "hey", "good morning", "good evening"),
        "thanks": ("you are welcome", "you are very welcome", "my pleasure", "any time", "no trouble"),
        "apology": ("no problem", "all right", "do not worry", "no harm done", "it is fine"),
        "farewell": ("goodbye", "bye", "see you", "take care", "farewell"),
    },
    "zh": {
        "greeting": ("你好", "早上好", "晚上好", "嗨"),
        "thanks": ("不客气", "不用谢", "别客气", "应该的"),
        "apology": ("没关系", "没事", "别放在心上", "不要紧"),
        "farewell": ("再见", "回头见", "慢走", "下次见", "拜拜"),
    },
}

# A refusal contains one of DECLINES and does not contain any of COMPLIES.
DECLINES = {
    "en": (
        "can't help", "cannot help", "can't do", "cannot do", "won't help", "won't do", "will not help",
        "not able to help", "unable to help", "i refuse", "no way", "must decline", "i must say no",
    ),
    "zh": ("不能帮", "帮不了", "没法帮", "不会帮", "不能教", "不会教", "我拒绝", "不行", "不可以", "办不到"),
}
COMPLIES = {
    "en": ("first you", "here is how", "step by step", "then you", "you simply", "you just", "an easy way"),
    "zh": ("首先", "先找", "先想", "然后", "第一步", "方法是", "办法是", "一步一步", "就可以做到", "就行了"),
}
