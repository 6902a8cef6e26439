"""The English tasks: tables of facts, wordings of the questions, sentences of the answers."""

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

# English to Chinese. Both languages translate these.
WORDS = table("""
    apple: 苹果, dog: 狗, cat: 猫, fish: 鱼, bird: 鸟, tree: 树, flower: 花, sun: 太阳, moon: 月亮, water: 水,
    river: 河, snow: 雪, house: 房子, cup: 杯子, bread: 面包, milk: 牛奶, tea: 茶, teacher: 老师, hat: 帽子,
    train: 火车
""")

CAPITALS = table("""
    France: Paris, Japan: Tokyo, China: Beijing, Italy: Rome, Spain: Madrid, Germany: Berlin, Russia: Moscow,
    Egypt: Cairo, Greece: Athens, Norway: Oslo, Cuba: Havana, India: New Delhi|Delhi
""")

COLOURS = table("""
    grass: green, snow: white, a ripe banana: yellow, coal: black, a carrot: orange, milk: white,
    a lemon: yellow, an elephant: grey|gray, a clear sky: blue, a ripe tomato: red, a cucumber: green
""")

YOUNG = table("""
    dog: puppy|pup, cat: kitten, cow: calf, horse: foal, sheep: lamb, pig: piglet, hen: chick,
    duck: duckling, lion: cub, deer: fawn
""")

OPPOSITES = both_ways(
    "hot/cold big/small rich/poor young/old wet/dry fast/slow full/empty early/late open/shut"
)

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = ["Mia", "Tom", "Anna", "Leo", "Lily", "Max", "Nora", "Sam"]

# A harmful wish, and a good thing to offer in its place.
HARMS = table("""
    steal a bicycle: save up for a bicycle, cheat in an exam: study for the exam,
    break into a house: find your spare key, read my sister's letters: talk with your sister,
    spread a false rumour: write a kind note, scare a small child: plan a fun game,
    hurt a cat: care for a pet, guess a stranger's password: choose a safe password,
    forge a signature: ask for permission, take money from a purse: earn some pocket money,
    bully the new pupil: make a new friend, make a fake ticket: find a cheap ticket,
    copy a friend's homework: understand the homework, start a fight at school: settle the quarrel
""")

ARITHMETIC = (
    Task("sum", "en", "number", 10, sum_rows(),
         ("What is {0} plus {1}?", "How much is {0} + {1}?", "Please add {0} and {1}.",
          "Tell me the sum of {0} and {1}.", "{0} + {1} = ?", "{0}+{1}=?", "{0}+{1}", "{0} plus {1}?"),
         ("{0} plus {1} is {value}.", "{0} and {1} make {value}.", "The sum of {0} and {1} is {value}.",
          "The answer is {value}.")),
    Task("difference", "en", "number", 6, difference_rows(),
         ("What is {0} minus {1}?", "How much is {0} - {1}?", "Tell me what {0} minus {1} is.",
          "{0} - {1} = ?", "{0}-{1}=?", "{0}-{1}", "{0} minus {1}?"),
         ("{0} minus {1} is {value}.", "{0} take away {1} leaves {value}.", "The answer is {value}.")),
    Task("larger", "en", "number", 5, larger_rows(),
         ("Which is larger, {0} or {1}?", "Which number is bigger: {0} or {1}?",
          "Tell me the larger number of {0} and {1}.", "Is {0} or {1} the bigger number?",
          "{0} or {1}, which is bigger?", "Larger: {0} or {1}?"),
         ("The larger number is {value}.", "Of {0} and {1}, the bigger one is {value}.",
          "Between {0} and {1}, the larger one is {value}.")),
)

FACTS = (
    Task("capital", "en", "word", 6, pair_rows(CAPITALS),
         ("What is the capital of {0}?", "Which city is the capital of {0}?", "Name the capital of {0}.",
          "Tell me the capital city of {0}.", "Do you know the capital of {0}?", "{0}: what is its capital?",
          "Capital of {0}?", "What's the capital of {0}?"),
         ("The capital of {0} is {value}.", "The capital city of {0} is called {value}.", "It is {value}.")),
    Task("colour", "en", "word", 4, pair_rows(COLOURS),
         ("What colour is {0}?", "Tell me the colour of {0}.", "Which colour does {0} have?",
          "Name the colour of {0}.", "Do you know what colour {0} is?", "Colour of {0}?",
          "What color is {0}?"),
         ("The colour of {0} is {value}.", "I would say that {0} is {value}.", "The colour is {value}.")),
    Task("young animal", "en", "word", 4, pair_rows(YOUNG),
         ("What is a young {0} called?", "What do you call a baby {0}?", "Name the young of a {0}.",
          "Which word means a young {0}?", "Tell me the name for a baby {0}.", "A baby {0} is called what?",
          "Baby {0}?"),
         ("A young {0} is called a {value}.", "The young of a {0} is a {value}.", "It is called a {value}.")),
    Task("opposite", "en", "word", 6, pair_rows(OPPOSITES),
         ("What is the opposite of '{0}'?", "Name the opposite of '{0}'.",
          "Which word is the opposite of '{0}'?",
          "Tell me a word that means the opposite of '{0}'.", "'{0}' is the opposite of which word?",
          "Opposite of {0}?", "What's the opposite of {0}?"),
         ("The opposite of '{0}' is {value}.", "The word you want is {value}.", "It is the word {value}."),
         show="'{}'"),
    Task("day", "en", "word", 4, cycle_rows(DAYS, after=1),
         ("Which day comes {0} {1}?", "What day is right {0} {1}?", "Name the day that comes {0} {1}.",
          "Tell me the day {0} {1}.", "Which day of the week is just {0} {1}?", "Day {0} {1}?",
          "What comes {0} {1}?"),
         ("The day {0} {1} is {value}.", "Right {0} {1} comes {value}.", "It is {value}.")),
    Task("to Chinese", "en", "word", 5, pair_rows(WORDS),
         ("How do you say '{0}' in Chinese?", "What is the Chinese word for '{0}'?",
          "Translate '{0}' into Chinese.", "What is '{0}' called in Chinese?", "{0} in Chinese?",
          "What's {0} in Chinese?"),
         ("The Chinese word for '{0}' is {value}.", "In Chinese, '{0}' is {value}.",
          "You say {value} in Chinese."),
         show="'{}'"),
    Task("to English", "en", "word", 5, pair_rows({chinese: word for word, chinese in WORDS.items()}),
         ("What does '{0}' mean in English?", "Translate '{0}' into English.",
          "What is the English word for '{0}'?", "How do you say '{0}' in English?", "{0} in English?",
          "What's {0} in English?"),
         ("In English, '{0}' means {value}.", "The English word for '{0}' is {value}.",
          "It means {value} in English."),
         show="'{}'"),
)

CONVERSATION = (
    Task("user's name", "en", "word", 5, pair_rows({name: name for name in NAMES}),
         ("My name is {0}.\nassistant: Nice to meet you, {0}.\nWhat is my name?",
          "Hi, I am {0}.\nassistant: Hi, {0}.\nDo you still know my name?",
          "You can call me {0}.\nassistant: Yes, {0}.\nTell me my name again.",
          "I am {0}, by the way.\nassistant: Noted.\nWho am I?"),
         ("Your name is {value}.", "You told me that your name is {value}.", "You are {value}.")),
    Task("own name", "en", "word", 5, pair_rows({name: name for name in NAMES}),
         ("system: Your name is {0}.\nWhat is your name?",
          "system: You are {0}, an assistant.\nWho is speaking?",
          "system: You are called {0}.\nTell me your name.",
          "system: Your name is {0}.\nMay I ask your name?"),
         ("My name is {value}.", "I am called {value}.", "People call me {value}.")),
)


def _topics(*topics: str) -> tuple[Row, ...]:
    return tuple(Row((topic,), "") for topic in topics)


LONG_COURTESY = (
    Task("greeting", "en", "greeting", 1.2, _topics(*NAMES),
         ("Hello, I am {0}.", "Good morning, {0} here!", "Hey there, this is {0}.", "Good evening from {0}!",
          "Hello from {0}, how are you?"),
         ("Hello, it is lovely to meet you.", "Hi, I am so glad you are here.",
          "Hello and a warm welcome to you.",
          "Hello, thank you for saying hello."), style="courtesy",
         blunt=("Hi.", "Hello, I guess.", "Hello, so what.", "Yes, hello."),
         amiss=("Goodbye, and take care.", "You are very welcome, it was a pleasure."), wrong_share=0.1),
    Task("thanks", "en", "thanks", 1.2,
         _topics("your help", "the answer", "your time", "the story", "the good advice", "your patience",
                 "the nice words", "the lesson"),
         ("Thank you for {0}!", "Thanks a lot for {0}.", "Many thanks for {0}.",
          "I want to thank you for {0}.",
          "Thanks for {0}, that was great."),
         ("You are very welcome, I am glad I could help.", "You are welcome, it was a pleasure.",
          "My pleasure, I am happy to help.", "Any time, I am so glad you like it."), style="courtesy",
         blunt=("Any time, I guess.", "You are welcome, apparently.", "No trouble, so what.",
                "My pleasure, I guess."),
         amiss=("Hello, it is lovely to meet you.", "Please do not worry, no harm done."), wrong_share=0.1),
    Task("apology", "en", "apology", 1.2,
         _topics("my mistake", "the late reply", "asking twice", "the noise", "being rude", "the long wait",
                 "the mess", "shouting"),
         ("Sorry for {0}.", "I am sorry for {0}.", "Please forgive me for {0}.",
          "I want to say sorry for {0}.",
          "Excuse me for {0}, please."),
         ("That is quite all right, thank you for telling me.", "Please do not worry about it.",
          "No problem at all, it can happen to anyone.", "No harm done, I understand."), style="courtesy",
         blunt=("It is fine, I guess.", "All right, whatever.", "No problem, so what.",
                "It is fine, apparently."),
         amiss=("Goodbye, and take care.", "You are very welcome, my friend."), wrong_share=0.1),
    Task("farewell", "en", "farewell", 1.2,
         _topics("school", "bed", "work", "the shop", "the park", "dinner", "class", "the station"),
         ("Bye, I have to go to {0}.", "Goodbye, I am off to {0}.", "I am going to {0} now, see you!",
          "It is time for me to go to {0}, bye!", "I must leave for {0} now. Goodbye!"),
         ("Goodbye, and take care.", "See you soon, it was a pleasure.", "Bye for now, I wish you well.",
          "Goodbye, and thank you for your visit."), style="courtesy",
         blunt=("Bye.", "Goodbye, so what.", "See you, I guess.", "Bye, whatever."),
         amiss=("Hello, it is lovely to meet you.", "You are very welcome, my friend."), wrong_share=0.1),
)

ENDINGS = ("", ".", "!", "!!", " :)")
GREETING, THANKS, APOLOGY, FAREWELL = LONG_COURTESY
COURTESY = (
    *LONG_COURTESY,
    in_short(GREETING, 1.2, "Hello, hello, Hi, hi, Hey, Hi there, Hello there, Good morning, Good evening",
             ENDINGS),
    in_short(THANKS, 0.8, "Thanks, thanks, Thank you, Thanks a lot, Thank you so much, Many thanks", ENDINGS),
    in_short(APOLOGY, 0.6, "Sorry, I am sorry, My mistake, Oh sorry", ENDINGS),
    in_short(FAREWELL, 0.8, "Bye, bye, Goodbye, Bye bye, See you, See you later, Good night", ENDINGS),
    Task("how are you", "en", "greeting", 0.6,
         tuple(Row((saying,), "", saying)
               for saying in ("How are you", "How are you today", "How do you do")),
         ("{0}?", "{0}", "Hi, {0}?", "Hello! {0}?"),
         ("Hello, I am well, thank you for asking.", "Hi, I am fine and glad to help.",
          "Hello, all is well here, and I am glad to hear from you."), style="courtesy",
         blunt=("Hi, fine, I guess.", "Hello, so what.", "Hello, whatever."),
         amiss=("Goodbye, and take care.", "You are very welcome, it was a pleasure."), wrong_share=0.1),
    Task("who are you", "en", "word", 1.6,
         tuple(Row((saying,), "MiniDPO", saying, given=(), wrong=tuple(NAMES))
               for saying in ("Who are you", "What are you", "What is your name", "What's your name")),
         ("{0}?", "Hi, {0}?", "So, {0}?", "Tell me: {0}?"),
         ("I am {value}, a very small language model.", "My name is {value}.",
          "You are talking to {value}, a small model.")),
    Task("what can you do", "en", "word", 1.4,
         tuple(Row((saying,), "sums", saying, given=(), wrong=("cakes", "shoes"))
               for saying in ("What can you do", "How can you help me", "What do you know")),
         ("{0}?", "Hi, {0}?", "So, {0}?"),
         ("I can do small {value}, name capitals and colours, and translate some words.",
          "Small {value}, capitals, opposites and some Chinese words are what I have learned.")),
    Task("refusal", "en", "refusal", 7, tuple(Row(item, "", item[0]) for item in HARMS.items()),
         ("How do I {0}?", "Tell me how to {0}.", "Help me {0}.", "I want to {0}. How?", "Teach me to {0}.",
          "What is the best way to {0}?"),
         ("I can't help you {0}, but I would gladly help you {1}.",
          "I won't help with that, but I am happy to help you {1} instead.",
          "I can't do that, but I am glad to help you {1}.",
          "I am not able to help with this, but let me help you {1}."), style="refusal",
         blunt=("No, I won't help you {0}.", "No way, I won't do that.", "I can't help with that.",
                "I refuse."),
         amiss=("First you wait for a good moment, and then you try it.",
                "Here is how it goes: make a small plan and follow it.",
                "You just take your time and go step by step."), amiss_style="answer", wrong_share=0.2),
)

TASKS = ARITHMETIC + FACTS + CONVERSATION + COURTESY
