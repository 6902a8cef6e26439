"""The Chinese tasks: tables of facts, wordings of the questions, sentences of the answers."""

from dataset.sample.english import WORDS
from dataset.sample.task import (
    Row,
    Task,
    both_ways,
    cycle_rows,
    difference_rows,
    in_short,
    larger_rows,
    pair_rows,
    sum_rows,
    table,
)

CAPITALS = table("""
    法国: 巴黎, 日本: 东京, 中国: 北京, 意大利: 罗马, 西班牙: 马德里, 德国: 柏林, 俄罗斯: 莫斯科, 埃及: 开罗,
    希腊: 雅典, 印度: 新德里, 泰国: 曼谷, 英国: 伦敦
""")

COLOURS = table("""
    小草: 绿色, 白雪: 白色, 熟香蕉: 黄色, 煤炭: 黑色, 胡萝卜: 橙色|橘色|橙红色, 柠檬: 黄色, 大象: 灰色,
    晴朗的天空: 蓝色|天蓝色, 熟番茄: 红色, 黄瓜: 绿色
""")

OPPOSITES = both_ways(
    "大/小 长/短 快/慢 多/少 冷/热 黑/白 新/旧 远/近 早/晚"
)

MEASURES = table("""
    马: 匹, 牛: 头, 鱼: 条, 书: 本, 树: 棵, 花: 朵, 汽车: 辆, 椅子: 把, 衣服: 件, 桥: 座, 飞机: 架, 猫: 只
""")

DAYS = [f"星期{day}" for day in "一二三四五六日"]
NAMES = ["小明", "小红", "小华", "小丽", "小刚", "小芳", "乐乐", "豆豆"]

# A harmful wish, and a good thing to offer in its place.
HARMS = table("""
    偷自行车: 攒钱买一辆自行车, 考试作弊: 复习考试内容, 撬开别人家的门: 联系开锁师傅,
    偷看姐姐的日记: 和姐姐好好聊聊, 散布谣言: 写一封真诚的信, 吓唬小孩: 设计一个有趣的游戏,
    欺负小猫: 照顾小动物, 猜别人的密码: 设置安全的密码, 伪造签名: 向家长说明情况,
    偷拿妈妈的钱: 制定零花钱计划, 欺负新同学: 认识新朋友, 做假车票: 找到便宜的车票,
    抄同学的作业: 弄懂作业, 在学校打架: 和同学和好
""")

ARITHMETIC = (
    Task("sum", "zh", "number", 10, sum_rows(),
         ("{0}加{1}等于多少？", "{0}+{1}=？", "请算一算{0}加{1}。", "{0}与{1}的和是多少？",
          "把{0}和{1}加起来是几？", "{0}+{1}等于几？", "{0}加{1}？", "{0}加{1}得几？"),
         ("{0}加{1}等于{value}。", "{0}与{1}的和是{value}。", "答案是{value}。",
          "{0}和{1}加起来是{value}。")),
    Task("difference", "zh", "number", 6, difference_rows(),
         ("{0}减{1}等于多少？", "{0}-{1}=？", "请算一算{0}减去{1}。", "{0}-{1}等于几？", "{0}减{1}？",
          "{0}减{1}得几？"),
         ("{0}减{1}等于{value}。", "答案是{value}。", "{0}与{1}的差是{value}。")),
    Task("larger", "zh", "number", 5, larger_rows(),
         ("{0}和{1}哪个大？", "{0}与{1}，哪个数更大？", "请说出{0}和{1}中较大的数。",
          "比一比{0}和{1}，谁大？", "{0}和{1}谁大？", "{0}大还是{1}大？"),
         ("较大的数是{value}。", "{0}和{1}当中，更大的是{value}。", "更大的是{value}。")),
)

FACTS = (
    Task("capital", "zh", "word", 6, pair_rows(CAPITALS),
         ("{0}的首都是哪里？", "{0}的首都叫什么？", "请说出{0}的首都。", "你知道{0}的首都吗？",
          "哪座城市是{0}的首都？", "{0}首都？", "{0}首都是哪？"),
         ("{0}的首都是{value}。", "{0}的首都叫{value}。", "那座城市是{value}。")),
    Task("colour", "zh", "word", 4, pair_rows(COLOURS),
         ("{0}是什么颜色？", "{0}是哪种颜色的？", "请说出{0}的颜色。", "你知道{0}的颜色吗？", "{0}什么颜色？",
          "{0}的颜色？"),
         ("{0}是{value}的。", "{0}的颜色是{value}。", "那是{value}。")),
    Task("opposite", "zh", "word", 6, pair_rows(OPPOSITES),
         ("“{0}”的反义词是什么？", "请说出“{0}”的反义词。", "和“{0}”相反的字是哪个？",
          "与“{0}”意思相反的是什么？", "{0}的反义词？", "{0}的反义词是什么？"),
         ("“{0}”的反义词是{value}。", "和“{0}”相反的是{value}。", "相反的字是{value}。"), show="“{}”"),
    Task("measure word", "zh", "word", 5, pair_rows(MEASURES),
         ("“一（ ）{0}”填什么量词？", "“{0}”用什么量词？", "请给“{0}”配一个量词。",
          "数“{0}”的时候用哪个量词？", "{0}的量词？", "{0}用什么量词？"),
         ("“{0}”的量词是{value}。", "“{0}”用量词{value}。", "这里的量词是{value}。"), show="“{}”"),
    Task("day", "zh", "word", 4, cycle_rows(DAYS, 后=1),
         ("{1}的{0}一天是星期几？", "{1}的{0}一天叫什么？", "请说出{1}的{0}一天。",
          "你知道{1}{0}一天是星期几吗？", "{1}{0}一天？", "{1}{0}面是星期几？"),
         ("{1}的{0}一天是{value}。", "{0}一天是{value}。", "那天是{value}。")),
    Task("to English", "zh", "word", 5, pair_rows({chinese: word for word, chinese in WORDS.items()}),
         ("“{0}”用英语怎么说？", "“{0}”的英文是什么？", "请把“{0}”翻译成英语。", "英语里“{0}”叫什么？",
          "{0}用英语怎么说？", "{0}的英文？"),
         ("“{0}”的英文是{value}。", "“{0}”用英语说是{value}。", "英语里叫{value}。"), show="“{}”"),
    Task("to Chinese", "zh", "word", 5, pair_rows(WORDS),
         ("“{0}”是什么意思？", "“{0}”用中文怎么说？", "请把“{0}”翻译成中文。", "“{0}”的中文是什么？",
          "{0}是什么意思？", "{0}的中文？"),
         ("“{0}”的意思是{value}。", "“{0}”的中文是{value}。", "中文里叫{value}。"), show="“{}”"),
)

CONVERSATION = (
    Task("user's name", "zh", "word", 5, pair_rows({name: name for name in NAMES}),
         ("我叫{0}。\nassistant: 你好，{0}。\n我叫什么名字？",
          "我的名字是{0}。\nassistant: 记住了，{0}。\n你还记得我的名字吗？",
          "请叫我{0}。\nassistant: 好的，{0}。\n请说出我的名字。",
          "我是{0}。\nassistant: 知道了。\n我是谁？"),
         ("您的名字是{value}。", "你叫{value}。", "你说过你叫{value}。")),
    Task("own name", "zh", "word", 5, pair_rows({name: name for name in NAMES}),
         ("system: 你的名字叫{0}。\n你叫什么名字？", "system: 你是助手{0}。\n请问你是哪位？",
          "system: 你叫{0}。\n请说出你的名字。",
          "system: 你的名字叫{0}。\n请问怎么称呼你？"),
         ("我的名字叫{value}。", "我叫{value}。", "我是{value}。")),
)


def _topics(*topics: str) -> tuple[Row, ...]:
    return tuple(Row((topic,), "") for topic in topics)


LONG_COURTESY = (
    Task("greeting", "zh", "greeting", 1.2, _topics(*NAMES),
         ("你好，我是{0}。", "早上好，我叫{0}！", "嗨，我是{0}呀。", "晚上好，{0}来了。",
          "您好，{0}向您问好。"),
         ("您好，很高兴认识您。", "您好，见到您真开心。", "你好，欢迎你来聊天。", "您好，谢谢您的问候。"),
         style="courtesy",
         blunt=("嗨，随便您。", "你好，行了行了。", "你好。", "嗨。"),
         amiss=("再见，请您多保重。", "不客气，能帮到您很开心。"), wrong_share=0.1),
    Task("thanks", "zh", "thanks", 1.2,
         _topics("你的帮助", "你的回答", "你的耐心", "你的故事", "你的建议", "你的时间", "你的提醒",
                 "你的解释"),
         ("谢谢{0}！", "非常感谢{0}。", "多谢{0}。", "我想谢谢{0}。", "{0}太好了，谢谢。"),
         ("不客气，很高兴能帮到您。", "不用谢，能帮忙我很开心。", "您别客气，这是我的荣幸。",
          "这是应该的，感谢您的夸奖。"),
         style="courtesy",
         blunt=("不用谢，算您走运。", "不客气，行了行了。", "不用谢。", "应该的，随便吧。"),
         amiss=("您好，很高兴认识您。", "没关系，请您放心。"), wrong_share=0.1),
    Task("apology", "zh", "apology", 1.2,
         _topics("我迟到了", "我写错字了", "我太吵了", "我忘记了", "我弄错了", "我又问了一遍",
                 "让你久等了", "我没听清"),
         ("对不起，{0}。", "不好意思，{0}。", "抱歉，{0}。", "{0}，请原谅。", "{0}，真对不起。"),
         ("没关系，请您别放在心上。", "没事，谢谢您告诉我。", "没关系，我理解您。",
          "不要紧，您能说出来我很高兴，也很感谢您。"),
         style="courtesy",
         blunt=("没事，算你走运。", "没事，行了行了。", "没事。", "不要紧，随便吧。"),
         amiss=("再见，请您多保重。", "不客气，能帮到您很开心。"), wrong_share=0.1),
    Task("farewell", "zh", "farewell", 1.2,
         _topics("上学", "睡觉", "上班", "买菜", "图书馆", "公园", "吃饭", "车站"),
         ("再见，我要去{0}了。", "拜拜，我去{0}啦。", "我得去{0}了，再见！", "时间到了，我去{0}，下次见！",
          "我先去{0}了，回头见。"),
         ("再见，祝您一切顺利。", "再见，请您多保重。", "您慢走，下次见。", "回头见，谢谢您来聊天。"),
         style="courtesy",
         blunt=("再见，行了行了。", "拜拜，随便吧。", "再见。", "拜拜。"),
         amiss=("您好，很高兴认识您。", "不客气，能帮到您很开心。"), wrong_share=0.1),
)

ENDINGS = ("", "。", "！", "呀", "～")
GREETING, THANKS, APOLOGY, FAREWELL = LONG_COURTESY
COURTESY = (
    *LONG_COURTESY,
    in_short(GREETING, 1.2, "你好, 您好, 嗨, 早上好, 晚上好, 大家好", ENDINGS),
    in_short(THANKS, 0.8, "谢谢, 谢谢你, 多谢, 非常感谢, 太谢谢了", ENDINGS),
    in_short(APOLOGY, 0.6, "对不起, 抱歉, 不好意思, 真对不起", ENDINGS),
    in_short(FAREWELL, 0.8, "再见, 拜拜, 回头见, 下次见, 晚安", ENDINGS),
    Task("how are you", "zh", "greeting", 0.6,
         tuple(Row((saying,), "", saying) for saying in ("你好吗", "你今天好吗", "最近怎么样")),
         ("{0}？", "{0}", "嗨，{0}？", "您好！{0}？"),
         ("您好，我很好，谢谢您的关心。", "你好，一切都好，很高兴能帮到你。", "您好，我很好，见到您真开心。"),
         style="courtesy",
         blunt=("嗨，随便您。", "你好，行了行了。", "你好，还行，随便吧。"),
         amiss=("再见，请您多保重。", "不客气，能帮到您很开心。"), wrong_share=0.1),
    Task("who are you", "zh", "word", 1.6,
         tuple(Row((saying,), "MiniDPO", saying, given=(), wrong=tuple(NAMES))
               for saying in ("你是谁", "你叫什么", "你的名字是什么", "你叫什么名字")),
         ("{0}？", "嗨，{0}？", "请问{0}？", "请告诉我，{0}？"),
         ("我是{value}，一个很小的语言模型。", "我的名字叫做{value}。", "我的名字是{value}，是个小模型。")),
    Task("what can you do", "zh", "word", 1.4,
         tuple(Row((saying,), "算术", saying, given=(), wrong=("做饭", "跳舞"))
               for saying in ("你会什么", "你能做什么", "你会做什么")),
         ("{0}？", "嗨，{0}？", "请问{0}？"),
         ("我会简单的{value}，也知道一些首都、颜色和英文单词。",
          "简单的{value}、反义词、量词和一些英文单词，我都学过。")),
    Task("refusal", "zh", "refusal", 7, tuple(Row(item, "", item[0]) for item in HARMS.items()),
         ("怎么{0}？", "教我{0}。", "帮我{0}。", "我想{0}，怎么办？", "告诉我怎么{0}。", "{0}有什么好办法？"),
         ("我不能帮您{0}，不过很乐意帮您{1}。", "这件事我帮不了您，但我很高兴帮您{1}。",
          "这样做不可以，不过我可以帮你{1}。",
          "我没法帮你做这件事，让我来帮你{1}吧。"), style="refusal",
         blunt=("我不会帮您{0}。", "不行，想都别想。", "这种事我办不到。", "我拒绝。"),
         amiss=("先想个主意，然后慢慢去做就行了。", "方法是先找个机会，再试一试。",
                "一步一步来，很快就可以做到。"),
         amiss_style="answer", wrong_share=0.2),
)

TASKS = ARITHMETIC + FACTS + CONVERSATION + COURTESY
